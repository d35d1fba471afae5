"""What the statistics return, and the settings they share."""

from dataclasses import dataclass
from typing import Literal

Label = Literal["checkpoint", "method"]

MIN_SEEDS = 3
"""Fewest seeds from which anything is said about a method."""

LEVEL = 0.95
"""The two-sided coverage that every interval aims at."""
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
