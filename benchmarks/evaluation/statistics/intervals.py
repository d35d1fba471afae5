"""Intervals of mean scores: over prompts for trained weights, over seeds for a method."""

import numpy as np
import numpy.typing as npt
import scipy.stats

from benchmarks.evaluation.statistics.bootstrap import bootstrap_ends
from benchmarks.evaluation.statistics.inputs import FloatArray, as_cube, as_matrix
from benchmarks.evaluation.statistics.records import LEVEL, MIN_SEEDS, RESAMPLES, Interval


def checkpoint_intervals(scores: npt.ArrayLike, *, resamples: int = RESAMPLES) -> list[Interval]:
    """Bootstrap intervals over prompts, one for each row of [quantities, prompts].

    Raises:
        ValueError: fewer than two prompts, or a score that is not finite.
    """
    matrix = as_matrix(scores, 2, "prompts")
    low, high = bootstrap_ends(matrix, resamples=resamples)
    return [
        Interval(float(mean), float(a), float(b), "checkpoint", matrix.shape[1])
        for mean, a, b in zip(matrix.mean(axis=1), low, high, strict=True)
    ]


def method_intervals(seed_means: npt.ArrayLike) -> list[Interval]:
    """Student's t intervals over seeds, one for each row of [quantities, seeds].

    They are about the mean over training seeds of the score on these very prompts.

    Raises:
        ValueError: fewer than three seeds, or a mean that is not finite.
    """
    matrix = as_matrix(seed_means, MIN_SEEDS, "seeds")
    means, half = matrix.mean(axis=1), t_half_width(matrix)
    return [
        Interval(float(mean), float(mean - width), float(mean + width), "method", matrix.shape[1])
        for mean, width in zip(means, half, strict=True)
    ]


def t_half_width(matrix: FloatArray) -> FloatArray:
    """Half the width of Student's t interval of each row's mean: [quantities]."""
    count = matrix.shape[1]
    quantile = float(scipy.stats.t.ppf((1 + LEVEL) / 2, count - 1))
    width: FloatArray = quantile * matrix.std(axis=1, ddof=1) / np.sqrt(count)
    return width


def row_intervals(scores: npt.ArrayLike) -> list[Interval]:
    """The intervals a table shows for one of its rows.

    With three seeds or more they are about the method; with one or two, about those checkpoints
    (each prompt's score averaged over the seeds).

    Args:
        scores: [quantities, seeds, prompts]; a base model has one "seed".

    Raises:
        ValueError: another shape, a score that is not finite, or one or two seeds with one prompt.
    """
    cube = as_cube(scores)
    if cube.shape[1] >= MIN_SEEDS:
        return method_intervals(cube.mean(axis=2))
    return checkpoint_intervals(cube.mean(axis=1))
