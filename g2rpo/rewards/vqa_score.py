"""VQAScore: how sure a vision-language model is that an image shows its prompt (arXiv 2404.01291).

The score is P("Yes"), the probability that the model's answer to the question starts with the first
token of "Yes" (with the models in use, the whole word): the softmax of the model's logits there,
without a temperature or penalties. "yes", " Yes" and other spellings do not count. The authors'
package t2v_metrics 3.0 computes the same for Qwen-VL models, but asks 'Does this image show "..."?'
and applies the penalties of the model's generation settings. The paper's own model, CLIP-FlanT5, is
not among transformers'; its score is the geometric mean of P("Yes") and of the answer's end.
"""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, Union

import torch
from torch import Tensor, nn

from g2rpo.errors import UserError
from g2rpo.rewards.base import BatchedReward, RewardConfig, question_of
from g2rpo.rewards.question import QWEN_ASPECT, QuestionConfig
from g2rpo.rewards.unified_reward.local import LocalModel, model_folder
from g2rpo.rewards.unified_reward.template import OWN, PUBLISHED, Template, choose_template

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion

    from g2rpo.rewards.unified_reward.server import ServerModel

PUBLISHED_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
QUESTION = Template.of('Does this figure show "{prompt}"? Please answer yes or no.')
ANSWER = "Yes"
LISTED = 20
"""Likeliest first tokens that a server is asked for; most servers list no more."""
NEGLIGIBLE = 1e-4
"""A probability below this may count as 0."""
_ROUNDED_ONE = 1.01
"""The largest sum of probabilities that a server rounds, some to bfloat16."""
_WITHOUT_EFFECT = ("aggregate", "max_answer_tokens", "cache", "cache_folder")
Asked = tuple[list[str], list[Sequence[str]], Any]
"""The prompts of N questions, their answers, and the backend's inputs."""


class VQAScore(BatchedReward):
    """P("Yes"), 0 to 1, of a model in this process or on a server that lists log-probabilities.

    ``question.template`` is a file, or None for the ``question_template.txt`` in the model's folder
    or else the paper's question.
    """

    name = "vqa_score"
    asks_question = True
    largest_aspect = QWEN_ASPECT
    published: ClassVar[str] = PUBLISHED_MODEL
    default_question: ClassVar[Template] = QUESTION
    suffix: ClassVar[str] = "yes"
    """The end of the version."""

    def __init__(
        self,
        backend: Union[LocalModel, "ServerModel"],
        template: Template,
        device: torch.device | str,
        batch_size: int,
    ) -> None:
        super().__init__(device, batch_size, f"{backend.model}-{self.suffix}", backend.weights_hash)
        self.backend, self.template, self.template_hash = backend, template, template.sha256
        self.settings = backend.settings

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """Loads the model, or sets up the client of its server without contacting it.

        Raises:
            UserError: the weights, the template or the key is missing, or a setting has no effect.
        """
        question = question_of(config)
        _check(cls.name, question)
        if question.server is not None:
            from g2rpo.rewards.unified_reward.server import Reading, ServerModel

            # Some servers list log-probabilities at the temperature of a request.
            options = {"temperature": 1, "logprobs": True, "top_logprobs": LISTED}
            reading = Reading("log-probabilities", _likeliest, options)
            server = ServerModel(question.server, 1, bool, reading)
            template = choose_template(question, server.model, default=cls.default_question)
            return cls(server, template, device, config.batch_size)
        source = config.source or cls.published
        folder = model_folder(source, config.revision)
        template = choose_template(question, source, folder, cls.default_question)
        local = LocalModel(folder, source, question, torch.device(device))
        return cls(local, template, device, config.batch_size)

    def networks(self) -> list[nn.Module]:
        return [self.backend.network] if isinstance(self.backend, LocalModel) else []

    def prepare(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Any:
        return self._ask_about(images, prompts, prompts, [(ANSWER,)] * len(prompts))

    def evaluate(self, prepared: Any) -> Tensor:
        """Scores ``[B]``.

        Raises:
            UserError: a server does not list the answer, which may yet be likely, or lists
                probabilities above 1; names the prompt.
        """
        return self._probabilities(prepared)

    def _ask_about(
        self,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
    ) -> Asked:
        texts = [self.template.question(question) for question in questions]
        return list(prompts), list(answers), self.backend.prepare(images, texts)

    def _probabilities(self, asked: Asked) -> Tensor:
        """The probabilities ``[N]`` of the answers to N questions."""
        prompts, answers, inputs = asked
        if isinstance(self.backend, LocalModel):
            return self.backend.first_token(inputs, answers)
        listed = zip(prompts, answers, self.backend.ask(inputs), strict=True)
        return torch.tensor([_probability(self.name, *each) for each in listed])


def _check(name: str, question: QuestionConfig) -> None:
    """Raises :class:`UserError` for settings of UnifiedReward that have no effect here."""
    idle = [key for key in _WITHOUT_EFFECT if key in question.model_fields_set]
    if idle:
        raise UserError(f"reward {name}: question.{idle[0]} has no effect; remove it")
    if question.template in (OWN, PUBLISHED):
        raise UserError(
            f"reward {name}: question.template {question.template!r} is UnifiedReward's; remove "
            "it, or set it to a file"
        )


def _likeliest(completion: "ChatCompletion") -> str | None:
    """The log-probabilities of the likeliest first tokens, as JSON."""
    logprobs = completion.choices[0].logprobs
    listed = logprobs.content[0].top_logprobs if logprobs and logprobs.content else []
    return json.dumps({each.token: float(each.logprob) for each in listed}) if listed else None


def _probability(name: str, prompt: str, answers: Sequence[str], likeliest: str) -> float:
    listed: dict[str, float] = json.loads(likeliest)
    total = math.fsum(math.exp(min(value, 1.0)) for value in listed.values())
    if not total <= _ROUNDED_ONE:
        raise UserError(
            f"reward {name}: the server's log-probabilities for prompt {prompt!r}, the largest "
            f"{max(listed.values()):g}, are of probabilities that add up to more than 1; update "
            "the server, ask another model, or run it in this process"
        )
    found = [math.exp(listed[answer]) for answer in answers if answer in listed]
    most = math.exp(min(listed.values()))
    if not found and most > NEGLIGIBLE:
        raise UserError(
            f"reward {name}: {answers[0]!r} is not among the {len(listed)} likeliest tokens that "
            f"the server lists for prompt {prompt!r}, and may have a probability up to {most:.2g}; "
            f"let the server list {LISTED}, ask another model, or run it in this process"
        )
    return min(1.0, math.fsum(found))
