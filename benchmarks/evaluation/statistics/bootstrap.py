"""The bootstrap over prompts: one set of resamples for all quantities, percentile ends.

B. Efron and R. Tibshirani, "An introduction to the bootstrap" (1993), chapter 13.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from benchmarks.evaluation.statistics.inputs import (
    CHUNK_ELEMENTS,
    FloatArray,
    as_matrix,
    rounding_of,
)
from benchmarks.evaluation.statistics.records import LEVEL, RESAMPLES
from g2rpo.seeds import generator


def bootstrap_means(scores: npt.ArrayLike, *, resamples: int = RESAMPLES) -> FloatArray:
    """Means over prompts drawn with replacement, the same draws for every row of ``scores``.

    Rows that share their prompts are thereby resampled in pairs. The draws depend only on the
    number of prompts and the number of resamples.

    Args:
        scores: [quantities, prompts].
        resamples: how many times the prompts are drawn.

    Returns:
        [resamples, quantities], float64.

    Raises:
        ValueError: fewer than two prompts, or a score that is not finite.
    """
    matrix = as_matrix(scores, 2, "prompts")
    prompts = matrix.shape[1]
    counts = _counts if resamples * prompts > CHUNK_ELEMENTS else _kept_counts
    sums = np.concatenate([part @ matrix.T for part in counts(prompts, resamples)])
    means: FloatArray = sums / prompts
    return means


def _counts(prompts: int, resamples: int) -> Iterator[FloatArray]:
    """How often each resample has each prompt, in chunks of [resamples, prompts].

    Counts turn the resampled means into one matrix product.
    """
    rng = generator(0, "bootstrap", prompts, resamples)
    chunk = max(1, CHUNK_ELEMENTS // prompts)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(0, prompts, size=(size, prompts))
        drawn += np.arange(size)[:, None] * prompts
        counts = np.bincount(drawn.ravel(), minlength=size * prompts).reshape(size, prompts)
        yield counts.astype(np.float64)


@lru_cache(maxsize=1)
def _kept_counts(prompts: int, resamples: int) -> tuple[FloatArray, ...]:
    """The same, kept: all rows of a table, and all their comparisons, share these draws."""
    return tuple(_counts(prompts, resamples))


def bootstrap_ends(
    scores: npt.ArrayLike, *, resamples: int = RESAMPLES, rounding: FloatArray | None = None
) -> FloatArray:
    """Lower and upper ends of the bootstrap interval of each row's mean.

    Args:
        scores: [quantities, prompts].
        resamples: how many times the prompts are drawn.
        rounding: [quantities]: a row that spreads no more than this is constant, and its interval
            is its mean. None takes the rounding of the scores themselves.

    Returns:
        [2, quantities], float64; never NaN.

    Raises:
        ValueError: fewer than two prompts, or a score that is not finite.
    """
    matrix = as_matrix(scores, 2, "prompts")
    means = bootstrap_means(matrix, resamples=resamples)
    rounding = rounding_of(matrix) if rounding is None else rounding
    tail = (1 - LEVEL) / 2
    ends = np.quantile(means, [tail, 1 - tail], axis=0)
    return np.where(np.ptp(matrix, axis=1) <= rounding, matrix.mean(axis=1), ends)
