"""Intervals of mean scores: over prompts for trained weights, over seeds for a method."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats

from benchmarks.evaluation.statistics.bootstrap import bootstrap_ends
from benchmarks.evaluation.statistics.inputs import FloatArray, as_cube, as_matrix, check_level
from benchmarks.evaluation.statistics.records import (
    LEVEL,
    MIN_SEEDS,
    RESAMPLES,
    Interval,
    Kind,
    Resampling,
)


def checkpoint_intervals(
    scores: npt.ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    kind: Kind = "percentile",
) -> list[Interval]:
    """Bootstrap intervals over prompts, one for each row of ``scores``.

    Args:
        scores: [quantities, prompts].
        level: two-sided coverage aimed at.
        resamples: bootstrap resamples.
        seed: names the bootstrap's draws.
        kind: ``percentile`` or ``bca``.

    Raises:
        ValueError: fewer than two prompts, or a score that is not finite.
    """
    matrix = as_matrix(scores, 2, "prompts")
    low, high = bootstrap_ends(matrix, Resampling(level, resamples, seed, kind))
    return [
        Interval(float(mean), float(a), float(b), "checkpoint", matrix.shape[1], level)
        for mean, a, b in zip(matrix.mean(axis=1), low, high, strict=True)
    ]


def method_intervals(seed_means: npt.ArrayLike, *, level: float = LEVEL) -> list[Interval]:
    """Student's t intervals over seeds, one for each row of [quantities, seeds].

    They are about the mean over training seeds of the score on these very prompts.

    Raises:
        ValueError: fewer than three seeds, or a mean that is not finite.
    """
    matrix = as_matrix(seed_means, MIN_SEEDS, "seeds")
    count = matrix.shape[1]
    means, half = matrix.mean(axis=1), t_half_width(matrix, level)
    return [
        Interval(float(mean), float(mean - width), float(mean + width), "method", count, level)
        for mean, width in zip(means, half, strict=True)
    ]


def t_half_width(matrix: FloatArray, level: float) -> FloatArray:
    """Half the width of Student's t interval of each row's mean: [quantities]."""
    check_level(level)
    count = matrix.shape[1]
    quantile = float(scipy.stats.t.ppf((1 + level) / 2, count - 1))
    width: FloatArray = quantile * matrix.std(axis=1, ddof=1) / np.sqrt(count)
    return width


def row_intervals(
    scores: npt.ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    kind: Kind = "percentile",
) -> list[Interval]:
    """The intervals a table shows for one of its rows.

    With three seeds or more they are about the method; with one or two, about those checkpoints
    (each prompt's score averaged over the seeds).

    Args:
        scores: [quantities, seeds, prompts]; a base model has one "seed".
        level: two-sided coverage aimed at.
        resamples: bootstrap resamples.
        seed: names the bootstrap's draws.
        kind: ``percentile`` or ``bca``; only the bootstrap has kinds.

    Raises:
        ValueError: another shape, a score that is not finite, or one or two seeds with one prompt.
    """
    cube = as_cube(scores)
    if cube.shape[1] >= MIN_SEEDS:
        return method_intervals(cube.mean(axis=2), level=level)
    return checkpoint_intervals(
        cube.mean(axis=1), level=level, resamples=resamples, seed=seed, kind=kind
    )


@dataclass(frozen=True)
class SeedSpread:
    """How a score varies from one training seed to another.

    Attributes:
        mean: over the seeds.
        std: sample standard deviation over the seeds (divided by seeds - 1).
        count: seeds.
    """

    mean: float
    std: float
    count: int


def seed_spreads(seed_means: npt.ArrayLike) -> list[SeedSpread]:
    """Mean and standard deviation over seeds of each row of [quantities, seeds].

    The spread of single trainings, not the uncertainty of their mean: that is
    :func:`method_intervals`. With fixed prompts it holds what training and the noise of the
    pictures vary.

    Raises:
        ValueError: fewer than two seeds, or a mean that is not finite.
    """
    matrix = as_matrix(seed_means, 2, "seeds")
    # Equal numbers can have a mean that is rounded, and so a spread of rounding.
    spread = np.where(np.ptp(matrix, axis=1) > 0, matrix.std(axis=1, ddof=1), 0.0)
    return [
        SeedSpread(float(mean), float(std), matrix.shape[1])
        for mean, std in zip(matrix.mean(axis=1), spread, strict=True)
    ]
