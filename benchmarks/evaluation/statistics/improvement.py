"""Probability of improvement: how often one model's picture scores higher than another's.

For one prompt and one seed, a win counts 1, a tie 1/2 and a loss 0; the probability is their mean
over prompts and seeds. R. Agarwal et al., "Deep reinforcement learning at the edge of the
statistical precipice" (NeurIPS 2021), average P(X > Y) over tasks, with every run of X against
every run of Y. Here the tasks are prompts, and the runs are paired: by prompt, and by the training
seed that both methods share.
"""

import numpy as np
import numpy.typing as npt

from benchmarks.evaluation.statistics.bootstrap import bootstrap_ends
from benchmarks.evaluation.statistics.inputs import FloatArray, paired_cubes
from benchmarks.evaluation.statistics.intervals import method_intervals
from benchmarks.evaluation.statistics.records import (
    DEFAULT_RESAMPLING,
    LEVEL,
    RESAMPLES,
    Interval,
    Kind,
    Resampling,
)


def wins(first: npt.ArrayLike, second: npt.ArrayLike) -> FloatArray:
    """1 where ``first`` scores higher, 1/2 where they tie, 0 elsewhere.

    Args:
        first: [quantities, seeds, prompts].
        second: the same quantities, seeds and prompts; one "seed" stands for a model without.

    Returns:
        [quantities, seeds, prompts], float64.

    Raises:
        ValueError: the two are not paired, or a score is not finite.
    """
    one, two = paired_cubes(first, second)
    won: FloatArray = ((one > two).astype(np.float64) + (one >= two)) / 2
    return won


def checkpoint_improvements(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    kind: Kind = "percentile",
) -> list[Interval]:
    """Probability that these trained weights score higher on a prompt like the held-out ones.

    Bootstrap over prompts of each prompt's share of wins among the seeds. Where the outcome is the
    same on every prompt a bootstrap sees no doubt at all; the interval then leaves room for the
    share of other outcomes that so many prompts can miss, 1 - (tail)^(1/prompts), as Clopper and
    Pearson's does.

    Args:
        first: [quantities, seeds, prompts].
        second: the same quantities, seeds and prompts; one "seed" stands for a model without.
        level: two-sided coverage aimed at.
        resamples: bootstrap resamples.
        seed: names the bootstrap's draws.
        kind: ``percentile`` or ``bca``.

    Raises:
        ValueError: the two are not paired, fewer than two prompts, or a score is not finite.
    """
    shares = wins(first, second).mean(axis=1)
    return share_intervals(shares, Resampling(level, resamples, seed, kind))


def share_intervals(
    shares: FloatArray, resampling: Resampling = DEFAULT_RESAMPLING
) -> list[Interval]:
    """Bootstrap intervals of mean shares over prompts, with room where all shares are the same.

    Args:
        shares: [quantities, prompts], each a share of wins between 0 and 1.
        resampling: level, resamples, draws and kind of interval.

    Raises:
        ValueError: fewer than two prompts, or a share is not finite.
    """
    level = resampling.level
    low, high = bootstrap_ends(shares, resampling)
    means, count = shares.mean(axis=1), shares.shape[1]
    unseen = 1 - ((1 - level) / 2) ** (1 / count)
    flat = np.ptp(shares, axis=1) == 0
    low = np.where(flat, means * (1 - unseen), low)
    high = np.where(flat, means * (1 - unseen) + unseen, high)
    return [
        Interval(float(mean), float(a), float(b), "checkpoint", count, level)
        for mean, a, b in zip(means, low, high, strict=True)
    ]


def method_improvements(
    first: npt.ArrayLike, second: npt.ArrayLike, *, level: float = LEVEL
) -> list[Interval]:
    """Probability that the method scores higher on these prompts when both are trained again.

    Student's t interval over the seeds' shares of wins, cut at 0 and 1. The seeds are the sample
    and the prompts are fixed, so neither is resampled: three seeds have ten distinct bootstrap
    samples, far too few for an interval, and resampling runs within each prompt apart, as for the
    independent tasks of Agarwal et al., would take the prompts of one training for independent
    trainings.

    Args:
        first: [quantities, seeds, prompts].
        second: the same quantities, seeds and prompts; one "seed" stands for a model without.
        level: two-sided coverage aimed at.

    Raises:
        ValueError: the two are not paired, fewer than three seeds, or a score is not finite.
    """
    shares = wins(first, second).mean(axis=2)
    return [
        Interval(i.mean, max(0.0, i.low), min(1.0, i.high), i.label, i.count, level)
        for i in method_intervals(shares, level=level)
    ]
