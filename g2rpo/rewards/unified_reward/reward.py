"""UnifiedReward (arXiv 2503.05236): a vision-language model rates an image for its caption.

Its textual answer states scores for alignment, coherence and style. The model runs in this process
or on a server. Answers are cached on disk, one small file each: any file system can share them,
where a database would need file locks that network file systems do not provide.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, Union

import torch
from torch import Tensor, nn

from g2rpo.errors import UserError
from g2rpo.files import atomic_write_text
from g2rpo.hub.cache import own_cache
from g2rpo.rewards.base import BatchedReward, RewardConfig, question_of
from g2rpo.rewards.question import ASPECTS, QWEN_ASPECT, QuestionConfig
from g2rpo.rewards.unified_reward.answers import (
    MalformedAnswerError,
    Scores,
    read_scores,
    well_formed,
)
from g2rpo.rewards.unified_reward.template import Template, choose_template
from g2rpo.text import excerpt

if TYPE_CHECKING:
    from g2rpo.rewards.unified_reward.local import LocalModel
    from g2rpo.rewards.unified_reward.server import ServerModel

PUBLISHED = "CodeGoat24/UnifiedReward-qwen-7b"
CACHE_VERSION = 1


def answers_folder() -> Path:
    """The default cache of answers."""
    return own_cache() / "answers"


def answer_key(image: Tensor, prompt: str, asked: dict[str, Any]) -> str:
    """The SHA-256 of everything that affects an answer; ``asked``: model, template, settings."""
    digest = hashlib.sha256()
    head = {"version": CACHE_VERSION, "shape": list(image.shape), "prompt": prompt, "asked": asked}
    digest.update(json.dumps(head, sort_keys=True).encode() + b"\n")
    digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class PreparedQuestions:
    """A batch of B questions; ``inputs`` are the backend's, for those without a cached answer."""

    prompts: list[str]
    keys: list[str]
    answers: list[str | None]
    inputs: Any


class UnifiedReward(BatchedReward):
    """The mean (by default) of three scores on the question's scale, usually 1 to 5."""

    name: ClassVar[str] = "unified_reward"
    asks_question = True
    largest_aspect = QWEN_ASPECT
    part_names = ASPECTS

    def __init__(
        self,
        backend: Union["LocalModel", "ServerModel"],
        template: Template,
        config: QuestionConfig,
        device: torch.device | str,
        batch_size: int,
    ) -> None:
        version = f"{backend.model}-{config.aggregate_name()}"
        super().__init__(device, batch_size, version, backend.weights_hash)
        self.backend, self.template, self.settings = backend, template, backend.settings
        self.template_hash = template.sha256
        self.weights = torch.tensor(list(config.weights().values()), dtype=torch.float64)
        named = config.cache_folder
        folder = Path(named).expanduser() if named else answers_folder()
        self.cache = folder if config.cache else None
        self._asked = {
            "model": backend.weights_hash,
            "template": template.sha256,
            "settings": backend.settings,
        }

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """Loads the model, or sets up the client of its server without contacting it.

        Raises:
            UserError: the weights, the template or the key is missing; says how to get it.
        """
        question = question_of(config)
        if question.server is not None:
            from g2rpo.rewards.unified_reward.server import ServerModel

            template = choose_template(question, question.server.model)
            server = ServerModel(
                question.server,
                question.max_answer_tokens,
                lambda answer: well_formed(answer, template.low, template.high),
            )
            return cls(server, template, question, device, config.batch_size)
        from g2rpo.rewards.unified_reward.local import LocalModel, model_folder
        from g2rpo.rewards.weights import is_hub_id

        source = config.source or PUBLISHED
        if is_hub_id(source):  # before downloading 16 GB
            choose_template(question, source)
        folder = model_folder(source, config.revision)
        template = choose_template(question, source, folder)
        local = LocalModel(folder, source, question, torch.device(device))
        return cls(local, template, question, device, config.batch_size)

    def networks(self) -> list[nn.Module]:
        network = getattr(self.backend, "network", None)
        return [] if network is None else [network]

    def prepare(self, images: Sequence[Tensor], prompts: Sequence[str]) -> PreparedQuestions:
        """See :meth:`BatchedReward.prepare`; looks up cached answers."""
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
            UserError: no answer, or one without all three scores; names the prompt.
        """
        given = iter([] if prepared.inputs is None else self.backend.ask(prepared.inputs))
        answers = [next(given) if answer is None else answer for answer in prepared.answers]
        if self.cache is not None:
            # Before any answer is rejected: a rerun need not ask for the good ones again.
            for key, old, answer in zip(prepared.keys, prepared.answers, answers, strict=True):
                if old is None and well_formed(answer, self.template.low, self.template.high):
                    self._keep(key, answer)
        pairs = zip(prepared.prompts, answers, strict=True)
        parts = torch.tensor([self._read(*pair) for pair in pairs], dtype=torch.float64)
        return torch.cat([(parts @ self.weights)[:, None], parts], dim=1).float()

    def _known(self, key: str) -> str | None:
        if self.cache is None:
            return None
        try:
            answer = json.loads(self._path(key).read_bytes())["answer"]
            return answer if well_formed(answer, self.template.low, self.template.high) else None
        except (OSError, ValueError, LookupError, TypeError):  # missing or damaged
            return None

    def _keep(self, key: str, answer: str) -> None:
        try:
            atomic_write_text(self._path(key), json.dumps({"answer": answer}) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.cache}: cannot cache answers ({error.strerror}); set "
                "question.cache_folder to a writable folder, or question.cache: false"
            ) from None

    def _path(self, key: str) -> Path:
        assert self.cache is not None
        return self.cache / key[:2] / f"{key}.json"

    def _read(self, prompt: str, answer: str) -> Scores:
        try:
            return read_scores(answer, self.template.low, self.template.high)
        except MalformedAnswerError as error:
            masked = getattr(self.backend, "masked", str)  # a server may repeat its key
            raise UserError(
                f"reward unified_reward: {masked(str(error))} for prompt {prompt!r} in the answer "
                f"{excerpt(masked(answer))!r}; check that question.template is this model's and "
                "that question.max_answer_tokens does not truncate answers"
            ) from None
