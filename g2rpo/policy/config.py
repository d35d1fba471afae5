"""Configuration of a policy; imports no model library, since plans read it."""

import math
from typing import Any, Literal, Self

import pydantic
from pydantic import Field, SerializationInfo, SerializerFunctionWrapHandler

from g2rpo.config import StrictModel, nearest, unhashed
from g2rpo.policy.architectures import ARCHITECTURES

ATTENTION_MODULES = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""The joint attention's projections; not those of SD3.5's second attention (``attn2``)."""
TARGET_MODULES = (
    *ATTENTION_MODULES,
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
"""Attention and MLP projections, as diffusers' own LoRA training names them."""


class ImageConfig(StrictModel):
    """The size of images in pixels, and the guidance they are sampled with.

    A dump has the resolution of square images and the height and width of others, however they were
    written, so that one size has one hash. A dump without unset values is as written: it is a layer
    that others are merged over.
    """

    resolution: int | None = Field(None, gt=0)
    """Side of square images, in pixels; not needed where ``height`` and ``width`` are set."""
    height: int | None = Field(None, gt=0)
    """In pixels; null is ``resolution``."""
    width: int | None = Field(None, gt=0)
    """In pixels; null is ``resolution``."""
    guidance_scale: float = Field(3.5, ge=0)
    """Embedded guidance of FLUX, unused without guidance_embeds; classifier-free guidance of SD3,
    where it is above 1. Training may have another (``guidance.training_scale``)."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.height or self.resolution, self.width or self.resolution
        assert height is not None and width is not None
        return height, width

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return math.prod(self.size)

    @property
    def sides(self) -> dict[str, int]:
        """Height and width by the key that sets them, which may be one for both."""
        names = [
            name if getattr(self, name) is not None else "resolution"
            for name in ("height", "width")
        ]
        return dict(zip(names, self.size, strict=True))

    @pydantic.field_validator("resolution", mode="before")
    @classmethod
    def _one_side(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            raise ValueError("one number, for square images; for others, set height and width")
        return value

    @pydantic.model_validator(mode="after")
    def _both_sides(self) -> Self:
        if self.resolution is None and None in (self.height, self.width):
            raise ValueError("set resolution, or height and width")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _one_way(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if info.exclude_unset:
            return fields
        height, width = self.size
        left_out = {"height", "width"} if height == width else {"resolution"}
        sides = {"resolution": height, "height": height, "width": width}
        return {key: sides.get(key, v) for key, v in fields.items() if key not in left_out}


class PolicyConfig(ImageConfig):
    """Which model to load, and the constants of its forward pass."""

    source: str = Field(min_length=1)
    """A diffusers folder of a FluxPipeline or a StableDiffusion3Pipeline, or a hub id such as
    black-forest-labs/FLUX.1-dev."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is the pinned one, else the default branch."""
    pipeline: str | None = unhashed(None)
    """The class of its diffusers pipeline, for a policy that is neither on this machine yet nor in
    the catalogue; plans and presets depend on it."""
    max_sequence_length: int = Field(default=512, ge=1, le=512)
    """T5 tokens to which prompts are padded or truncated."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute dtype. Latents stay float32 outside the transformer, and trained weights have float32
    master copies. ``float64`` is for checking numerics: everything but noise and rewards is then
    float64."""

    @pydantic.field_validator("pipeline")
    @classmethod
    def _supported(cls, value: str | None) -> str | None:
        if value is not None and value not in ARCHITECTURES:
            raise ValueError(f"not supported; {nearest(value, ARCHITECTURES)}")
        return value

    def at(self, images: ImageConfig) -> Self:
        """This policy at the size and guidance of ``images``."""
        return self.model_copy(
            update={name: getattr(images, name) for name in ImageConfig.model_fields}
        )


class CheckpointConfig(StrictModel):
    """Weights of a transformer that replace the base's."""

    source: str = Field(min_length=1)
    """A folder, a file, or a hub id."""
    subfolder: str | None = None
    """Subfolder of the source."""
    file: str | None = None
    """The safetensors file, or the index of several; None is diffusers' default name."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is the pinned one, else the default branch."""


class LoraConfig(StrictModel):
    """Trains low-rank adapters instead of the transformer's own weights.

    There is no dropout: training and rollout forward must be identical.
    """

    rank: int = Field(128, ge=1)
    alpha: float = Field(256.0, gt=0)
    """The adapters' output is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = Field(TARGET_MODULES, min_length=1)
    """Suffixes of the linear layers with an adapter; ``attention`` stands for those of the joint
    attention, as Flow-GRPO's code has them."""

    @pydantic.field_validator("target_modules", mode="before")
    @classmethod
    def _attention(cls, value: Any) -> Any:
        return ATTENTION_MODULES if value == "attention" else value


class HybridConfig(StrictModel):
    """MixGRPO's hybrid inference: the first steps with the tuned weights, the rest with the base's.

    Set exactly one field; the released script uses 30 of 50 steps.
    """

    tuned_steps: int | None = Field(None, ge=0)
    tuned_fraction: float | None = Field(None, ge=0, le=1)
    """Fraction of the grid's steps, rounded."""

    @pydantic.model_validator(mode="after")
    def _one_of_two(self) -> "HybridConfig":
        if (self.tuned_steps is None) == (self.tuned_fraction is None):
            raise ValueError("set either tuned_steps or tuned_fraction")
        return self

    def steps_of(self, steps: int) -> int:
        """The number of ``steps`` with the tuned weights."""
        if self.tuned_steps is not None:
            return self.tuned_steps
        assert self.tuned_fraction is not None
        return round(self.tuned_fraction * steps)


class StepCacheConfig(StrictModel):
    """Reuses block outputs between steps of a trajectory."""

    kind: Literal["first_block", "modulation"] = "first_block"
    """What is compared. ``first_block``: the first block's residual on the image tokens, as in
    first-block caching; reuses all other blocks. ``modulation``: the first block's modulation, a
    function of time and prompt, similar to TeaCache; reuses all blocks."""
    threshold: float = Field(gt=0)
    """Reuse below this mean absolute change, relative to the mean absolute value."""


class ContinuationConfig(StrictModel):
    """Approximations of continuations. Part of the run's hash, since they affect training."""

    merged_lora: bool = False
    """Merges adapters into a copy of their layers' weights, in the base's dtype, before each
    rollout. In bfloat16 this rounds small updates away."""
    fp8: bool = False
    """Multiplies the blocks' linear layers in float8, except modulations. Devices without float8
    kernels emulate it, more slowly than exact products."""
    step_cache: StepCacheConfig | None = None
    """Skips blocks whose inputs change little along a trajectory."""

    @pydantic.model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.merged_lora or self.fp8 or self.step_cache):
            raise ValueError(
                "approximate_rollout is empty; remove it, or set merged_lora, fp8 or step_cache"
            )
        return self
