"""Choices that G2RPO makes anew during training: its stochastic steps and its granularities.

Neither is in the paper. Both rest on sums that the training loop measures in some iterations
(:mod:`g2rpo.training.measuring`) on the current policy. Older sums are halved at each measurement,
so that a choice follows the policy but does not hang on a single batch.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

from pydantic import Field

from g2rpo.config import StrictModel

Measurement = Literal["signal_to_noise", "agreement"]
Measurements = Mapping[str, float]
"""The sums so far, by name: plain numbers, so that a checkpoint can hold them."""
DECAY = 0.5
"""Factor on the older sums at each measurement."""


def with_newer(old: Measurements | None, new: Measurements) -> dict[str, float]:
    """The sums after one more measurement."""
    known = old or {}
    return {**known, **{name: DECAY * known.get(name, 0.0) + new[name] for name in new}}


class Adaptive(StrictModel):
    """What all choices share."""

    every: int = Field(10, ge=1)
    """Iterations between two measurements; the first iteration has one. Their cost is counted."""

    def due(self, iteration: int) -> bool:
        """Whether ``iteration`` (counted from 0) measures."""
        return iteration % self.every == 0


class AdaptiveSteps(Adaptive):
    """Branches at the steps whose gradient has the largest signal-to-noise ratio.

    A measuring iteration branches at all candidate steps and trains all of them.
    """

    count: int = Field(ge=1)
    """Stochastic steps in the other iterations."""

    def chosen(self, steps: Sequence[int], measurements: Measurements | None) -> tuple[int, ...]:
        """The steps of an iteration that does not measure, ascending; the later one if equal."""
        ratios = signal_to_noise_ratios(measurements or {})
        best = sorted(steps, key=lambda step: (ratios.get(step, 0.0), step))[-self.count :]
        return tuple(sorted(best))


class AdaptiveGranularities(Adaptive):
    """Drops a granularity whose advantages agree with those of a coarser one that is kept.

    An iteration that measures uses all granularities.
    """

    threshold: float = Field(0.9, gt=-1, lt=1)
    """Mean rank correlation of the advantages in a group, above which the finer one is dropped."""

    def chosen(
        self, granularities: Sequence[int], measurements: Measurements | None
    ) -> tuple[int, ...]:
        """The granularities of an iteration that does not measure, in the configured order.

        Without measurements, as when a run is planned, the coarsest alone.
        """
        kept: list[int] = []
        agreements = rank_correlations(measurements or {})
        for fine in sorted(granularities, reverse=True):
            if kept and measurements is None:
                break
            if all(agreements.get((fine, one), 0.0) <= self.threshold for one in kept):
                kept.append(fine)
        return tuple(one for one in granularities if one in kept)


def signal_to_noise_ratios(measurements: Measurements) -> dict[int, float]:
    """The signal-to-noise ratio of each measured step's gradient, for one prompt."""
    return {
        int(key): _ratio(signal, measurements[f"noise/{key}"])
        for key, signal in _named("signal", measurements)
    }


def rank_correlations(measurements: Measurements) -> dict[tuple[int, int], float]:
    """The mean rank correlation of the advantages of a finer and a coarser granularity."""
    found = {}
    for key, total in _named("agreement", measurements):
        fine, coarse = map(int, key.split("/"))
        found[fine, coarse] = _ratio(total, measurements[f"groups/{key}"])
    return found


def pairs(granularities: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs of a finer and a coarser granularity."""
    return list(combinations(sorted(granularities), 2))


def _named(kind: str, measurements: Measurements) -> list[tuple[str, float]]:
    start = f"{kind}/"
    return [(k.removeprefix(start), v) for k, v in measurements.items() if k.startswith(start)]


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else 0.0
