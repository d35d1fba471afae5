"""How fast the parts of a stage are: a typed view of ``speeds.yaml``."""

import functools
from pathlib import Path

from pydantic import Field

from g2rpo.config import StrictModel, load_yaml, validate
from reproduce.experiment import Profile

SPEEDS = Path(__file__).with_name("speeds.yaml")


class Seconds(StrictModel):
    """How long one thing takes."""

    seconds: float = Field(ge=0)
    source: str
    """Where it was measured, or how it was derived."""
    estimated: bool = False
    """Whether it was derived or assumed, not measured."""


class Speeds(StrictModel):
    """The speeds of one kind of machine with one size of policy; times are of one device."""

    name: str
    hardware: str
    """The machine, in words."""
    profiles: tuple[str, ...]
    """The profiles that it stands for."""
    operations: float = Field(gt=0)
    """Floating-point operations of the velocity evaluation that was measured."""
    resolution: int = Field(gt=0)
    """Of the images that were measured."""
    evaluation: Seconds
    """One velocity of one latent."""
    training_state: Seconds
    """Forward and backward of one state."""
    decode: Seconds
    """One image."""
    image_file: Seconds
    """One PNG."""
    text: Seconds
    """One prompt encoded."""
    text_in_training: bool
    """Whether an iteration encodes its prompts; else they were encoded before."""
    score: dict[str, Seconds] = Field(min_length=1)
    """One image, by reward model."""
    iteration: Seconds
    """What else an iteration takes, however many devices share it."""
    start: dict[str, Seconds]
    """Of a stage, by kind."""
    process: Seconds
    """Of a new process, where ``start`` does not have it."""
    gigabyte: Seconds
    """Of checkpoints written."""
    stands_in: bool = False
    """Whether it is used for a profile that it was not measured for."""

    def score_of(self, model: str) -> Seconds:
        """Of one image by ``model``; of the slowest where nobody timed it."""
        if model in self.score:
            return self.score[model]
        slowest = max(self.score.values(), key=lambda each: each.seconds)
        return slowest.model_copy(update={"estimated": True})


class _SpeedsFile(StrictModel):
    speeds: tuple[Speeds, ...]


@functools.cache
def all_speeds() -> tuple[Speeds, ...]:
    """Every entry of ``speeds.yaml``."""
    return validate(_SpeedsFile, load_yaml(SPEEDS), str(SPEEDS)).speeds


def speeds_of(profile: Profile) -> Speeds:
    """The speeds of a profile; of the nearest machine where it has none of its own."""
    by_profile = {name: speeds for speeds in all_speeds() for name in speeds.profiles}
    if profile.name in by_profile:
        return by_profile[profile.name]
    flux = "flux" if profile.training.get("lora") is None else "flux-lora"
    nearest = by_profile[flux if profile.hardware.gpus else "mini"]
    return nearest.model_copy(update={"stands_in": True})
