"""What every reward model shares: its configuration, its protocol, and the scoring loop.

A reward model sees images as a saved PNG would hold them (8-bit RGB) and whole prompts, and gives
one float32 number per image. A score that is not finite is an error, never a number.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, Self

import torch
from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from g2rpo.config import StrictModel, nearest
from g2rpo.errors import UserError
from g2rpo.rewards.question import QuestionConfig

Images = Tensor | Sequence[Tensor]
"""uint8 RGB: one tensor ``[N, H, W, 3]``, or N of ``[H, W, 3]``, each of its own size."""


def _as_text(value: object) -> object:
    """A variant may look like a number, and YAML then reads it as one."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class RewardConfig(StrictModel):
    """Which reward model to load, from where, and how many images it scores at a time."""

    model: str
    """Name in the registry (``g2rpo.rewards.registry.REWARDS``)."""
    source: str | None = None
    """Folder or hub id of the weights; None means the published default of the model."""
    revision: str | None = None
    """Hub revision (commit) of the weights; None means the newest."""
    variant: Annotated[str | None, BeforeValidator(_as_text)] = None
    """Choice among a model's published variants or score scales; None means its default."""
    batch_size: int = Field(default=32, ge=1)
    """Images per forward pass; scores do not depend on it beyond float32 rounding."""
    question: QuestionConfig | None = None
    """How a model that is asked in words is asked; for no other."""

    @model_serializer(mode="wrap")
    def _without_an_absent_question(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Runs are named by a hash of this: those of the other models keep their names.
        fields: dict[str, Any] = handler(self)
        if self.question is None:
            fields.pop("question", None)
        return fields


class RewardModel(Protocol):
    """Anything that scores images against prompts."""

    @property
    def name(self) -> str:
        """Registry name."""

    version: str
    """Model version and score convention, e.g. ``v2.1`` or ``v1-cosine``."""
    weights_hash: str
    """SHA-256 of the weights file."""

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores N images against ``prompts`` (N strings).

        Returns:
            float32 ``[N]`` on the CPU, all finite.

        Raises:
            UserError: malformed input, or a score that is not finite (the prompt is named).
        """
        ...


def check_inputs(name: str, images: Images, prompts: Sequence[str]) -> None:
    """Refuses anything but N uint8 RGB images with N non-empty prompts."""
    if isinstance(prompts, str):
        raise UserError(f"{name}: prompts must be a list of strings, not one string")
    if isinstance(images, Tensor) and images.ndim != 4:
        raise UserError(f"{name}: images must be [N, H, W, 3], not {list(images.shape)}")
    for image in images[:1] if isinstance(images, Tensor) else images:
        if image.dtype != torch.uint8:
            raise UserError(
                f"{name}: images must be uint8 in 0..255, as a saved PNG holds them, "
                f"not {image.dtype}"
            )
        if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
            raise UserError(
                f"{name}: images must be [N, H, W, 3], or N of [H, W, 3] each; "
                f"one is {list(image.shape)}"
            )
    if len(prompts) != len(images):
        raise UserError(f"{name}: {len(images)} images but {len(prompts)} prompts; need one each")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(f"{name}: prompt {index} is empty; every image needs a prompt")


def check_finite(name: str, scores: Tensor, prompts: Sequence[str]) -> None:
    """Refuses scores ``[N, columns]`` that are NaN or infinite, naming the first such prompt."""
    bad = (~torch.isfinite(scores)).any(1).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{name}: score {scores[bad[0]].tolist()} is not finite for prompt {prompts[bad[0]]!r} "
            f"({len(bad)} of {len(prompts)} images); check the image and the model's weights"
        )


def choose_variant(config: RewardConfig, valid: Sequence[str]) -> str:
    """The configured variant, or the first of ``valid``, which is the default.

    Raises:
        UserError: the configured variant is not among ``valid``.
    """
    if config.variant is None:
        return valid[0]
    if config.variant not in valid:
        hint = nearest(config.variant, valid)
        raise UserError(f"reward {config.model}: unknown variant {config.variant!r}; {hint}")
    return config.variant


class BatchedReward(ABC):
    """Base of the reward models: checks, batches, and verifies.

    The work of a batch is in two parts: :meth:`prepare`, on the CPU and in any thread, so that it
    can run ahead, and :meth:`evaluate`, on the device.
    """

    name: ClassVar[str]
    part_names: tuple[str, ...] = ()
    """What the score is made of, where a model answers several questions."""
    template_hash: str | None = None
    """SHA-256 of the question put to the model, where it is asked in words."""

    def __init__(
        self, device: torch.device | str, batch_size: int, version: str, weights_hash: str
    ) -> None:
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.version = version
        self.weights_hash = weights_hash

    @classmethod
    @abstractmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """Loads the model in evaluation mode and float32.

        Raises:
            UserError: the weights are not there or do not fit, and how to get them.
        """

    def prepare(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Any:
        """What :meth:`evaluate` needs of B checked images and prompts, on the CPU; thread-safe.

        Images and prompts as they are, unless a subclass can do some of its work here.
        """
        return images, prompts

    @abstractmethod
    def evaluate(self, prepared: Any) -> Tensor:
        """Scores ``[B]``, or ``[B, 1 + parts]`` with the score first where there are parts."""

    def too_long(self, prompts: Sequence[str]) -> list[bool]:
        """Whether each prompt is longer than what the model reads; the rest of it is cut off."""
        return [False] * len(prompts)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of what :meth:`score_prepared` gives: the reward's own, then its parts'."""
        return (self.name, *(f"{self.name}.{part}" for part in self.part_names))

    @torch.no_grad()
    def score_prepared(self, prepared: Any, prompts: Sequence[str]) -> Tensor:
        """Float32 ``[B, columns]`` on the CPU, all finite, of one prepared batch."""
        scores = self.evaluate(prepared).float().cpu().reshape(len(prompts), len(self.columns))
        check_finite(self.name, scores, prompts)
        return scores

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """See :meth:`RewardModel.score`."""
        check_inputs(self.name, images, prompts)
        scores = torch.empty(len(images), dtype=torch.float32)
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            prepared = self.prepare([image.cpu() for image in images[part]], prompts[part])
            scores[part] = self.score_prepared(prepared, prompts[part])[:, 0]
        return scores


def once_each(prompts: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct prompts in first-seen order, and the index ``[N]`` of each prompt in them.

    A group of images shares its prompt, so encoding each distinct prompt once saves most of the
    text tower's work.
    """
    positions: dict[str, int] = {}
    index = [positions.setdefault(prompt, len(positions)) for prompt in prompts]
    return list(positions), torch.tensor(index, dtype=torch.long)


@dataclass(frozen=True)
class PreparedPairs:
    """A batch for a model of two towers.

    ``pixels`` ``[B, 3, S, S]``; ``tokens`` of the distinct prompts, and ``index`` ``[B]`` of each
    image's prompt in them.
    """

    pixels: Tensor
    tokens: Any
    index: Tensor

    def to(self, device: torch.device) -> "PreparedPairs":
        """The same on ``device``."""
        return PreparedPairs(self.pixels.to(device), self.tokens.to(device), self.index.to(device))
