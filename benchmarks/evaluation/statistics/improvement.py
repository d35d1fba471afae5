"""Probability of improvement: how often one model's picture scores higher than another's.

For one prompt and one seed, a win counts 1, a tie 1/2 and a loss 0; the probability is their mean
over prompts and seeds. R. Agarwal et al., "Deep reinforcement learning at the edge of the
statistical precipice" (NeurIPS 2021), average P(X > Y) over tasks, with every run of X against
every run of Y. Here the tasks are prompts, and the runs are paired: by prompt, and by the training
seed that both methods share.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from benchmarks.evaluation.statistics.bootstrap import bootstrap_ends
from benchmarks.evaluation.statistics.inputs import FloatArray, paired_cubes
from benchmarks.evaluation.statistics.intervals import method_intervals
from benchmarks.evaluation.statistics.records import LEVEL, RESAMPLES, Interval


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
    first: npt.ArrayLike, second: npt.ArrayLike, *, resamples: int = RESAMPLES
) -> list[Interval]:
    """Probability that these trained weights score higher on a prompt like the held-out ones.

    Args:
        first: [quantities, seeds, prompts].
        second: the same quantities, seeds and prompts; one "seed" stands for a model without.
        resamples: bootstrap resamples.

    Raises:
        ValueError: the two are not paired, fewer than two prompts, or a score is not finite.
    """
    return share_intervals(wins(first, second).mean(axis=1), resamples=resamples)


def share_intervals(shares: FloatArray, *, resamples: int = RESAMPLES) -> list[Interval]:
    """Bootstrap intervals over prompts of mean shares of wins, [quantities, prompts].

    Where the share is the same on every prompt a bootstrap sees no doubt at all; the interval then
    leaves room for the share of other outcomes that so many prompts can miss,
    1 - (tail)^(1/prompts), as Clopper and Pearson's does.

    Raises:
        ValueError: fewer than two prompts, or a share is not finite.
    """
    low, high = bootstrap_ends(shares, resamples=resamples)
    means, count = shares.mean(axis=1), shares.shape[1]
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / count)
    flat = np.ptp(shares, axis=1) == 0
    low = np.where(flat, means * (1 - unseen), low)
    high = np.where(flat, means * (1 - unseen) + unseen, high)
    return [
        Interval(float(mean), float(a), float(b), "checkpoint", count)
        for mean, a, b in zip(means, low, high, strict=True)
    ]


def method_improvements(first: npt.ArrayLike, second: npt.ArrayLike) -> list[Interval]:
    """Probability that the method scores higher on these prompts when both are trained again.

    Student's t interval over the seeds' shares of wins, cut at 0 and 1. The seeds are the sample
    and the prompts are fixed, so neither is resampled: three seeds have ten distinct bootstrap
    samples, far too few for an interval, and resampling runs within each prompt apart, as for the
    independent tasks of Agarwal et al., would take the prompts of one training for independent
    trainings.

    Args:
        first: [quantities, seeds, prompts].
        second: the same quantities, seeds and prompts; one "seed" stands for a model without.

    Raises:
        ValueError: the two are not paired, fewer than three seeds, or a score is not finite.
    """
    return [
        replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))
        for interval in method_intervals(wins(first, second).mean(axis=2))
    ]
