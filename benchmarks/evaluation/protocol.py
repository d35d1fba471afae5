"""The protocol by which cells are evaluated. Nothing here imports a model library."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from g2rpo.config import StrictModel
from g2rpo.flow.schedule import GridConfig
from g2rpo.policy.config import HybridConfig


class DiversityConfig(StrictModel):
    """Which images are compared, and by what."""

    prompts: int = Field(ge=2)
    """The first so many held-out prompts."""
    images: int = Field(ge=2)
    """Images a prompt; the first is the one that is scored."""
    features: str = "clip"
    """The judge of the profile whose image tower gives the features."""


class DriftConfig(StrictModel):
    """On which inputs the velocities are compared."""

    prompts: int = Field(ge=2)
    """The first so many held-out prompts."""
    sigmas: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.9, 0.7, 0.5, 0.3, 0.1), min_length=1
    )
    """Noise levels; the transformer is told them exactly."""


class CreditConfig(StrictModel):
    """How it is measured what a step's noise does to the reward, and a step's gradient with it."""

    samples: int = Field(32, ge=4)
    """Pairs of samples a prompt that share the noise of one step alone."""
    repeats: int = Field(16, ge=3)
    """Groups, drawn anew for the same prompts, whose gradients are compared."""
    rollouts: int = Field(3, ge=1)
    """Of a method whose rollout changes over the training: rollouts, evenly over its iterations."""


class EvaluationConfig(StrictModel):
    """How held-out images are sampled: the named protocol that a table states."""

    name: str
    """What the protocol is called in tables."""
    split: Literal["validation", "test"] = "test"
    limit: int | None = Field(None, ge=2)
    """Uses the first so many prompts of the split; null uses all. An interval needs two."""
    seed: int = 1223627
    """Names the noise, together with the prompt's id (the released sampler seed)."""
    grid: GridConfig = GridConfig(steps=50, schedule="flux_dynamic", timestep="exact")
    """The released evaluation: 50 steps on diffusers' own grid."""
    resolution: int = Field(1024, gt=0)
    guidance_scale: float = Field(3.5, ge=0)
    diversity: DiversityConfig | None = None
    """Measures how different the images of one prompt are; null leaves it out."""
    drift: DriftConfig | None = None
    """Measures how far the policy is from its base; null leaves it out."""
    hybrid: HybridConfig | None = None
    """Finishes the images of a tuned policy with its base; null does not."""

    @model_validator(mode="after")
    def _handover_on_the_grid(self) -> "EvaluationConfig":
        if self.hybrid is not None and self.hybrid.steps_of(self.grid.steps) > self.grid.steps:
            raise ValueError(
                f"hybrid.tuned_steps: {self.hybrid.tuned_steps} is more than the "
                f"{self.grid.steps} steps of the grid"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_absent_sections(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Evaluations are named by a hash of this: those without the sections keep their names.
        fields: dict[str, Any] = handler(self)
        for name in ("diversity", "drift", "hybrid"):
            if getattr(self, name) is None:
                fields.pop(name, None)
        return fields
