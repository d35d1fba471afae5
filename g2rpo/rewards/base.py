"""The configuration, protocol and scoring loop shared by all reward models.

A reward model takes images as a PNG stores them (8-bit RGB) with their whole prompts, and returns
one float32 number per image. A score that is not finite is an error.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Protocol, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from g2rpo.config import StrictModel, nearest, unhashed
from g2rpo.errors import UserError
from g2rpo.offload import on_device
from g2rpo.rewards.question import QuestionConfig
from g2rpo.rewards.server import ServerConfig
from g2rpo.text import is_unicode

Images = Tensor | Sequence[Tensor]
"""uint8 RGB: one tensor ``[N, H, W, 3]``, or N of ``[H, W, 3]``, each of its own size."""


def _as_text(value: object) -> object:
    """YAML reads variants such as 224 as numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class RewardConfig(StrictModel):
    """Which reward model to load, from where, and its batch size."""

    model: str
    """Name in the registry (``g2rpo.rewards.registry.REWARDS``)."""
    source: str | None = None
    """Folder or hub id of the weights; None is the published default of the model."""
    revision: str | None = None
    """Hub revision (commit) of the weights; None is the pinned one, else the newest."""
    variant: Annotated[str | None, BeforeValidator(_as_text)] = None
    """One of the model's published variants or score scales; None is its default."""
    batch_size: int = Field(default=32, ge=1)
    """Images per forward pass; affects scores only by float32 rounding."""
    question: QuestionConfig | None = unhashed(None)
    """The question to a vision-language model; only for rewards that ask one."""
    server: ServerConfig | None = unhashed(None)
    """The server of the reward ``http``. ``url: http://host:8000`` is short for it."""

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, data: Any) -> Any:
        """``url: URL`` is short for ``server: {url: URL}``, and ``questions`` likewise."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        server = data.get("server") or {}
        if "url" in data and isinstance(server, dict):
            if server.get("url", data["url"]) != data["url"]:
                raise ValueError("url and server.url are different; set one of them")
            data["server"] = server | {"url": data.pop("url")}
        question = data.get("question") or {}
        if "questions" in data and isinstance(question, dict):
            data["question"] = question | {"questions": data.pop("questions")}
        return data

    @model_validator(mode="after")
    def _served(self) -> Self:
        if (self.model == "http") != (self.server is not None):
            raise ValueError(
                "the reward http, and only that, needs url: http://host:8000 or a section server; "
                "the server of a vision-language model is question.server"
            )
        if self.server is not None and (self.source or self.revision or self.variant):
            raise ValueError(
                "the server of the reward http has the model; remove source, revision and variant"
            )
        return self


class RewardModel(Protocol):
    """A model that scores images against prompts."""

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
    """Raises :class:`UserError` unless there are N uint8 RGB images and N prompts of text."""
    if isinstance(prompts, str):
        raise UserError(f"{name}: prompts must be a list of strings, not one string")
    if isinstance(images, Tensor) and images.ndim != 4:
        raise UserError(f"{name}: images must be [N, H, W, 3], not {list(images.shape)}")
    for image in images[:1] if isinstance(images, Tensor) else images:
        if image.dtype != torch.uint8:
            raise UserError(f"{name}: images must be uint8 in 0..255, not {image.dtype}")
        if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
            raise UserError(
                f"{name}: images must be [N, H, W, 3], or N images of [H, W, 3]; "
                f"got {list(image.shape)}"
            )
    if len(prompts) != len(images):
        raise UserError(
            f"{name}: {len(images)} images but {len(prompts)} prompts; give one prompt per image"
        )
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(f"{name}: prompt {index} is empty; give one prompt per image")
        if not is_unicode(prompt):  # tokenizers fail on lone surrogates
            raise UserError(f"{name}: prompt {index} is not valid Unicode; correct it")


def check_finite(name: str, scores: Tensor, prompts: Sequence[str]) -> None:
    """Raises :class:`UserError` for the first prompt with a NaN or infinity in ``[N, columns]``."""
    bad = (~torch.isfinite(scores)).any(1).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{name}: score {scores[bad[0]].tolist()} is not finite for prompt {prompts[bad[0]]!r} "
            f"({len(bad)} of {len(prompts)} images); check the image and the model's weights"
        )


def question_of(config: RewardConfig) -> QuestionConfig:
    """The question of a reward that asks a vision-language model and has no variants.

    Raises:
        UserError: there is a variant, or both a server and weights.
    """
    question = config.question or QuestionConfig()
    if config.variant is not None:
        raise UserError(f"reward {config.model}: has no variants; remove `variant`")
    if question.server is not None and (config.source or config.revision):
        raise UserError(
            f"reward {config.model}: question.server selects the model; remove `source` and "
            "`revision`"
        )
    return question


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
    """Base of the reward models: checks the input, scores it in batches, checks the scores.

    A batch is processed in two parts: :meth:`prepare`, on the CPU and in any thread, so that it can
    run ahead, and :meth:`evaluate`, on the device.
    """

    name: ClassVar[str]
    part_names: tuple[str, ...] = ()
    """Names of the partial scores, where there are any."""
    asks_question: ClassVar[bool] = False
    """Whether the configuration may have a ``question``."""
    has_questions: ClassVar[bool] = False
    """Whether it may have ``questions``, which differ from prompt to prompt."""
    largest_aspect: ClassVar[float] = math.inf
    """Largest ratio of an image's sides."""
    template_hash: str | None = None
    """SHA-256 of the question, for vision-language models."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """What decides a score beside these: dtype, files of the preprocessing; as JSON values."""

    def __init__(
        self, device: torch.device | str, batch_size: int, version: str, weights_hash: str
    ) -> None:
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.version = version
        self.weights_hash = weights_hash
        self.offloaded = False
        """Whether the networks are on the device only while they score (:meth:`offload`)."""

    @classmethod
    @abstractmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """Loads the model in evaluation mode and float32.

        Raises:
            UserError: the weights are missing or do not fit; says how to get them.
        """

    @classmethod
    def unscorable(cls, config: RewardConfig, prompts: Iterable[str]) -> dict[str, str]:
        """Which of ``prompts`` the model cannot score images of, and why, before it is loaded.

        Raises:
            UserError: the configuration is wrong, or a file that it names.
        """
        del config, prompts  # most models score any
        return {}

    def prepare(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Any:
        """Preprocesses B checked images and prompts for :meth:`evaluate`; thread-safe."""
        return images, prompts

    def networks(self) -> list[nn.Module]:
        """The model's networks."""
        return [value for value in vars(self).values() if isinstance(value, nn.Module)]

    def offload(self) -> None:
        """Keeps the networks in CPU memory while :meth:`score` is not running."""
        self.offloaded = True
        for network in self.networks():
            network.to("cpu")

    @abstractmethod
    def evaluate(self, prepared: Any) -> Tensor:
        """Scores ``[B]``, or ``[B, 1 + parts]`` with the score first where there are parts."""

    def too_long(self, prompts: Sequence[str]) -> list[bool]:
        """Whether each prompt is longer than the model's context, and so truncated."""
        return [False] * len(prompts)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of :meth:`score_prepared`: the reward's own, then its parts'."""
        return (self.name, *(f"{self.name}.{part}" for part in self.part_names))

    @torch.no_grad()
    def score_prepared(self, prepared: Any, prompts: Sequence[str]) -> Tensor:
        """Scores one prepared batch: float32 ``[B, columns]`` on the CPU, all finite.

        Raises:
            UserError: :meth:`evaluate` returned something else.
        """
        found, shape = self.evaluate(prepared), (len(prompts), len(self.columns))
        given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if given != shape and not (given == shape[:1] and shape[1] == 1):
            raise UserError(
                f"{self.name}: {type(self).__name__}.evaluate returned {given} for {shape[0]} "
                f"images; return a tensor of shape {list(shape if shape[1] > 1 else shape[:1])}"
            )
        scores = found.float().cpu().reshape(shape)
        check_finite(self.name, scores, prompts)
        return scores

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        check_inputs(self.name, images, prompts)
        scores = torch.empty(len(images), dtype=torch.float32)
        with on_device(self.networks(), self.device, offloaded=self.offloaded):
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                prepared = self.prepare([image.cpu() for image in images[part]], prompts[part])
                scores[part] = self.score_prepared(prepared, prompts[part])[:, 0]
        return scores
