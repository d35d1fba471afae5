"""What a policy is configured with. Nothing here imports a model library: plans are made of it."""

from typing import Literal, Self

import pydantic
from pydantic import Field

from g2rpo.config import StrictModel

TARGET_MODULES = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
"""Attention and MLP projections, as diffusers' own FLUX LoRA training names them."""


class PolicyConfig(StrictModel):
    """Which FLUX to load, and the constants of its forward pass."""

    source: str = Field(min_length=1)
    """A diffusers FluxPipeline folder, or a hub id such as black-forest-labs/FLUX.1-dev."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository; None is its default branch."""
    resolution: int = Field(gt=0)
    """Side of the square images, in pixels."""
    guidance_scale: float = Field(default=3.5, ge=0)
    """Embedded guidance; unused by a transformer without guidance_embeds."""
    max_sequence_length: int = Field(default=512, ge=1, le=512)
    """T5 tokens a prompt is padded or cut to."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """In which everything is computed; latents stay float32 outside of the transformer, and what is
    trained is kept in float32 beside it. ``float64`` is for checking numerics: there everything but
    noise and rewards is float64."""


class CheckpointConfig(StrictModel):
    """Where the weights of a transformer are that takes the place of the base's."""

    source: str = Field(min_length=1)
    """A folder, a file, or a hub id."""
    subfolder: str | None = None
    """Where in the source."""
    file: str | None = None
    """The safetensors file, or the index of several; None is diffusers' own name."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is the pinned one, else the default branch."""


class LoraConfig(StrictModel):
    """Trains low-rank adapters in place of the transformer's own weights.

    There is no dropout: it would make the training forward another one than the rollout's.
    """

    rank: int = Field(128, ge=1)
    alpha: float = Field(256.0, gt=0)
    """The adapters' product is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = Field(TARGET_MODULES, min_length=1)
    """Linear layers that get an adapter: those whose name ends so."""


class HybridConfig(StrictModel):
    """MixGRPO's hybrid inference: the first steps with the tuned weights, the rest with the base's.

    One of the two is given; the released script has 30 of 50 steps.
    """

    tuned_steps: int | None = Field(None, ge=0)
    tuned_fraction: float | None = Field(None, ge=0, le=1)
    """Share of the grid's steps, rounded to whole ones."""

    @pydantic.model_validator(mode="after")
    def _one_of_two(self) -> "HybridConfig":
        if (self.tuned_steps is None) == (self.tuned_fraction is None):
            raise ValueError("give either tuned_steps or tuned_fraction")
        return self

    def steps_of(self, steps: int) -> int:
        """How many of ``steps`` the tuned weights take."""
        if self.tuned_steps is not None:
            return self.tuned_steps
        assert self.tuned_fraction is not None
        return round(self.tuned_fraction * steps)


class StepCacheConfig(StrictModel):
    """What is compared along a trajectory, and how much it may change."""

    kind: Literal["first_block", "modulation"] = "first_block"
    """``first_block``: what the first block adds to the image tokens, as in first-block caching;
    the rest of the blocks is reused. ``modulation``: the first block's modulation, which depends
    on time and prompt alone, in the manner of TeaCache; all blocks are reused."""
    threshold: float = Field(gt=0)
    """Mean absolute change over mean absolute value, below which is reused."""


class ContinuationConfig(StrictModel):
    """How continuations are approximated. Part of a run's name: it changes what is trained."""

    merged_lora: bool = False
    """Adapters are added into a copy of their layers' weights, in the base's dtype, before each
    rollout. In bfloat16 that rounds small updates away."""
    fp8: bool = False
    """The blocks' linear layers multiply in float8, modulations excepted. Emulated where the
    device has no such kernels, which is slower than exact."""
    step_cache: StepCacheConfig | None = None
    """Skips blocks where little changes along a trajectory."""

    @pydantic.model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.merged_lora or self.fp8 or self.step_cache):
            raise ValueError(
                "approximate_rollout names no approximation; leave it out, or set merged_lora, fp8 "
                "or step_cache"
            )
        return self
