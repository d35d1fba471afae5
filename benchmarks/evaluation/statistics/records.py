"""What the statistics return, and the settings they share."""

from dataclasses import dataclass
from typing import Literal, get_args

from benchmarks.evaluation.statistics.inputs import check_level

Label = Literal["checkpoint", "method"]
Kind = Literal["percentile", "bca"]

MIN_SEEDS = 3
"""Fewest seeds from which anything is said about a method."""

LEVEL = 0.95
ALPHA = 0.05
"""A corrected p-value below it counts as significant."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval.

    Attributes:
        mean: the estimate; for several seeds the mean over seeds and prompts.
        low: lower end.
        high: upper end.
        label: what the interval is about, see the package's docstring.
        count: independent units behind it: prompts (checkpoint) or seeds (method).
        level: the coverage aimed at.
    """

    mean: float
    low: float
    high: float
    label: Label
    count: int
    level: float = LEVEL


@dataclass(frozen=True)
class Comparison:
    """The paired difference ``first - second`` with its interval and two-sided p-value.

    Attributes:
        difference: mean paired difference, in the score's own unit.
        low: lower end of its interval.
        high: upper end.
        p_value: sign-flip permutation test (checkpoint) or paired t-test (method).
        label: what is compared, see the package's docstring.
        count: prompts or seeds that were paired.
        level: the coverage the interval aims at.
    """

    difference: float
    low: float
    high: float
    p_value: float
    label: Label
    count: int
    level: float = LEVEL


@dataclass(frozen=True)
class CorrectedComparison:
    """One member of a family of comparisons whose p-values were corrected together.

    Attributes:
        first: the row that is looked at.
        second: the row it is compared with.
        reward: the score.
        comparison: first minus second.
        adjusted: Holm-corrected p-value.
        family: how many comparisons were corrected together.
        improvement: probability that first scores higher than second on a prompt, under the same
            label; None where it was not asked for.
    """

    first: str
    second: str
    reward: str
    comparison: Comparison
    adjusted: float
    family: int
    improvement: Interval | None = None

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is below :data:`ALPHA`."""
        return self.adjusted < ALPHA


@dataclass(frozen=True)
class Resampling:
    """How intervals are formed and how much is resampled.

    Attributes:
        level: two-sided coverage aimed at.
        resamples: of the bootstrap and of the permutation test.
        seed: names the draws.
        kind: ``percentile`` (the default), or ``bca``, Efron's bias-corrected and accelerated ends.

    Raises:
        ValueError: the level is not between 0 and 1, there is no resample, or the kind is unknown.
    """

    level: float = LEVEL
    resamples: int = RESAMPLES
    seed: int = 0
    kind: Kind = "percentile"

    def __post_init__(self) -> None:
        check_level(self.level)
        if self.resamples < 1:
            raise ValueError(f"needs at least 1 resample, got {self.resamples}")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is one of {', '.join(get_args(Kind))}, not {self.kind!r}")


DEFAULT_RESAMPLING = Resampling()
