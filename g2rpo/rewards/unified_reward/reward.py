"""UnifiedReward (arXiv 2503.05236): a vision-language model rates an image for its caption.

It is asked for alignment, coherence and style, and answers in words, from which the scores are
read. The model runs in this process or on a server; answers are kept on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.rewards.base import BatchedReward, RewardConfig
from g2rpo.rewards.question import ASPECTS, QuestionConfig
from g2rpo.rewards.unified_reward.answers import (
    MalformedAnswerError,
    Scores,
    excerpt,
    read_scores,
    well_formed,
)
from g2rpo.rewards.unified_reward.backend import Backend
from g2rpo.rewards.unified_reward.cache import AnswerCache, answer_key, default_folder
from g2rpo.rewards.unified_reward.template import Template, choose_template

PUBLISHED = "CodeGoat24/UnifiedReward-qwen-7b"


@dataclass(frozen=True)
class PreparedQuestions:
    """A batch of B questions; ``inputs`` are the backend's, of those without an answer."""

    prompts: list[str]
    keys: list[str]
    answers: list[str | None]
    inputs: Any


class UnifiedReward(BatchedReward):
    """The mean (by default) of three scores on the question's scale, 1 to 5; higher is better."""

    name: ClassVar[str] = "unified_reward"
    part_names = ASPECTS

    def __init__(
        self,
        backend: Backend,
        template: Template,
        config: QuestionConfig,
        device: torch.device | str,
        batch_size: int,
    ) -> None:
        version = f"{backend.model}-{config.aggregate_name()}"
        super().__init__(device, batch_size, version, backend.weights_hash)
        self.backend, self.template = backend, template
        self.template_hash = template.sha256
        self.weights = torch.tensor(list(config.weights().values()), dtype=torch.float64)
        folder = Path(config.cache_folder).expanduser() if config.cache_folder else None
        self.cache = AnswerCache(folder or default_folder()) if config.cache else None
        self._asked = {
            "model": backend.weights_hash,
            "template": template.sha256,
            "settings": backend.settings,
        }

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """Loads the model, or sets up its server, which is first spoken to at the first question.

        Raises:
            UserError: the weights, the template or the key are not there, and how to get them.
        """
        question = config.question or QuestionConfig()
        if config.variant is not None:
            raise UserError("reward unified_reward: it has no variants; remove `variant`")
        backend: Backend
        if question.server is not None:
            if config.source is not None or config.revision is not None:
                raise UserError(
                    "reward unified_reward: question.server chooses the model; remove `source` "
                    "and `revision`"
                )
            from g2rpo.rewards.unified_reward.server import ServerModel

            template = choose_template(question, question.server.model)
            backend = ServerModel(
                question.server,
                question.max_answer_tokens,
                lambda answer: well_formed(answer, template.low, template.high),
            )
        else:
            from g2rpo.rewards.unified_reward.local import (
                LocalModel,
                is_hub_id,
                model_folder,
            )

            source = config.source or PUBLISHED
            if is_hub_id(source):  # before 16 GB are fetched in vain
                choose_template(question, source)
            folder = model_folder(source, config.revision)
            template = choose_template(question, source, folder)
            name = source if is_hub_id(source) else folder.resolve().name
            backend = LocalModel(folder, name, question, torch.device(device))
        return cls(backend, template, question, device, config.batch_size)

    def prepare(self, images: Sequence[Tensor], prompts: Sequence[str]) -> PreparedQuestions:
        """See :meth:`BatchedReward.prepare`; looks up the answers that are known."""
        pairs = list(zip(images, prompts, strict=True))
        keys = [answer_key(image, prompt, self._asked) for image, prompt in pairs]
        answers = [self._known(key) for key in keys]
        unknown = [pair for pair, answer in zip(pairs, answers, strict=True) if answer is None]
        inputs = None
        if unknown:
            questions = [self.template.question(prompt) for _, prompt in unknown]
            inputs = self.backend.prepare([image for image, _ in unknown], questions)
        return PreparedQuestions(list(prompts), keys, answers, inputs)

    def evaluate(self, prepared: PreparedQuestions) -> Tensor:
        """Scores ``[B, 4]``: the aggregate, alignment, coherence, style.

        Raises:
            UserError: there is no answer, or one without all three scores; the prompt is named.
        """
        given = iter([] if prepared.inputs is None else self.backend.ask(prepared.inputs))
        answers = [next(given) if answer is None else answer for answer in prepared.answers]
        if self.cache is not None:
            # All before any is refused: the run that follows need not ask for these again.
            for key, old, answer in zip(prepared.keys, prepared.answers, answers, strict=True):
                if old is None and well_formed(answer, self.template.low, self.template.high):
                    self.cache.put(key, answer)
        pairs = zip(prepared.prompts, answers, strict=True)
        parts = torch.tensor([self._read(*pair) for pair in pairs], dtype=torch.float64)
        return torch.cat([(parts @ self.weights)[:, None], parts], dim=1).float()

    def _known(self, key: str) -> str | None:
        answer = self.cache.get(key) if self.cache is not None else None
        if answer is None or not well_formed(answer, self.template.low, self.template.high):
            return None
        return answer

    def _read(self, prompt: str, answer: str) -> Scores:
        try:
            return read_scores(answer, self.template.low, self.template.high)
        except MalformedAnswerError as error:
            raise UserError(
                f"reward unified_reward: {error} for prompt {prompt!r} in the answer "
                f"{excerpt(answer)!r}; check that question.template belongs to this model "
                "and that question.max_answer_tokens does not cut answers off"
            ) from None
