"""The speeds of the parts of a stage: a typed view of ``speeds.yaml``."""

import functools
from pathlib import Path

from pydantic import Field

from g2rpo.config import StrictModel, load_yaml, validate
from reproduce.experiment import Profile

SPEEDS = Path(__file__).with_name("speeds.yaml")


class Seconds(StrictModel):
    """The seconds that one operation takes."""

    seconds: float = Field(ge=0)
    source: str
    """Where it was measured, or how it was derived."""
    estimated: bool = False
    """Whether it was derived or assumed instead of measured."""


class Speeds(StrictModel):
    """The speeds of one machine type and policy size; times are per device."""

    name: str
    hardware: str
    """Description of the machine."""
    profiles: tuple[str, ...]
    """The profiles it applies to."""
    operations: float = Field(gt=0)
    """Floating-point operations of the measured velocity evaluation."""
    resolution: int = Field(gt=0)
    """Side of the measured images, which are square."""
    evaluation: Seconds
    """One velocity evaluation of one latent."""
    training_state: Seconds
    """Forward and backward pass of one state."""
    decode: Seconds
    """Decoding one image."""
    image_file: Seconds
    """Writing one PNG."""
    text: Seconds
    """Encoding one prompt."""
    text_in_training: bool
    """Whether an iteration encodes its prompts, instead of reading embeddings."""
    score: dict[str, Seconds] = Field(min_length=1)
    """Scoring one image, by reward model."""
    iteration: Seconds
    """Overhead of an iteration, independent of the number of devices."""
    start: dict[str, Seconds]
    """Start-up of a stage, by kind."""
    process: Seconds
    """Start-up of a process, if not included in ``start``."""
    gigabyte: Seconds
    """Writing one gigabyte of checkpoints."""
    stands_in: bool = False
    """Whether it is used for a profile it was not measured for."""

    def score_of(self, model: str) -> Seconds:
        """Scoring one image with ``model``; the slowest model's time if not measured."""
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
    """The speeds of a profile, or those of the most similar machine."""
    by_profile = {name: speeds for speeds in all_speeds() for name in speeds.profiles}
    if profile.name in by_profile:
        return by_profile[profile.name]
    flux = "flux" if profile.training.get("lora") is None else "flux-lora"
    nearest = by_profile[flux if profile.hardware.gpus else "mini"]
    return nearest.model_copy(update={"stands_in": True})
