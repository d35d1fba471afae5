"""The evaluation protocol. Nothing here imports a model library."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from g2rpo.config import StrictModel, unhashed
from g2rpo.flow.schedule import GridConfig
from g2rpo.policy.config import HybridConfig, ImageConfig


class DiversityConfig(StrictModel):
    """Diversity of the images of a prompt."""

    prompts: int = Field(ge=2)
    """Number of held-out prompts, from the first."""
    images: int = Field(ge=2)
    """Images per prompt; the first is the scored one."""
    features: str = "clip"
    """The reward model of the profile whose image tower gives the features."""


class DriftConfig(StrictModel):
    """Drift of the velocities from the base."""

    prompts: int = Field(ge=2)
    """Number of held-out prompts, from the first."""
    sigmas: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.9, 0.7, 0.5, 0.3, 0.1), min_length=1
    )
    """Noise levels, passed to the transformer exactly."""


class CreditConfig(StrictModel):
    """Effect of each step's noise on the reward, and the SNR of its gradient."""

    samples: int = Field(32, ge=4)
    """Pairs of samples per prompt that share only the noise of one step."""
    repeats: int = Field(16, ge=3)
    """Groups drawn for the same prompts, whose gradients are compared."""
    rollouts: int = Field(3, ge=1)
    """If a method's rollout changes during training: rollouts, evenly over its iterations."""


class EvaluationConfig(ImageConfig):
    """How held-out images are sampled: the protocol that a table names."""

    name: str
    """Name of the protocol in tables."""
    split: Literal["validation", "test"] = "test"
    limit: int | None = Field(None, ge=2)
    """Number of prompts of the split, from the first; null uses all. An interval needs two."""
    seed: int = 1223627
    """Seed of the noise, with the prompt's id (the released sampler seed)."""
    grid: GridConfig = GridConfig(steps=50, schedule="flux_dynamic", timestep="exact")
    """The released evaluation: 50 steps on diffusers' own grid."""
    resolution: int | None = Field(1024, gt=0)
    images: int = unhashed(1, ge=1)
    """Images per prompt, each with its own noise; a prompt's score is their mean."""
    diversity: DiversityConfig | None = unhashed(None)
    """Diversity of the images of one prompt; null skips it."""
    drift: DriftConfig | None = unhashed(None)
    """Drift of the policy from its base; null skips it."""
    hybrid: HybridConfig | None = unhashed(None)
    """Finishes the images of a tuned policy with its base; null disables it."""

    @model_validator(mode="after")
    def _handover_on_the_grid(self) -> "EvaluationConfig":
        if self.hybrid is not None and self.hybrid.steps_of(self.grid.steps) > self.grid.steps:
            raise ValueError(
                f"hybrid.tuned_steps: {self.hybrid.tuned_steps} exceeds the grid's "
                f"{self.grid.steps} steps"
            )
        return self


def protocol_line(inputs: Mapping[str, Any]) -> str:
    """What an evaluation was sampled with, in one line.

    Args:
        inputs: what determines its images, as its manifest records them; what an older version
            did not record is left out. Prompts are named by the start of their SHA-256.
    """
    protocol, policy = inputs["protocol"], inputs.get("policy", {})
    grid, side = protocol["grid"], protocol.get("resolution")
    steps, schedule = grid["steps"], grid.get("schedule")
    shift = "" if schedule == "flux_dynamic" else f", shift {grid.get('shift', 3.0):g}"
    named = f"{schedule}{shift}".removeprefix("shifted, ")
    hybrid = HybridConfig.model_validate(protocol.get("hybrid") or {"tuned_fraction": 1.0})
    tuned = hybrid.steps_of(steps)
    parts = (
        f"{protocol.get('height', side)}×{protocol.get('width', side)}",
        f"{steps} steps" + (f" ({named})" if schedule else ""),
        f"the base after {tuned}" if tuned < steps else "",
        f"guidance {protocol['guidance_scale']:g}" if "guidance_scale" in protocol else "",
        f"images per prompt: {protocol.get('images', 1)}",
        f"seed {protocol['seed']}",
        policy.get("dtype", ""),
        f"the first {protocol['limit']} prompts" if protocol.get("limit") else "",
        f"prompts SHA-256 {inputs['prompts'][:12]}",
    )
    return ", ".join(part for part in parts if part)
