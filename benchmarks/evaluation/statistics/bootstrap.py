"""The bootstrap over prompts: one set of resamples for all quantities, percentile or BCa ends.

B. Efron, "Better bootstrap confidence intervals", Journal of the American Statistical Association
82 (1987); B. Efron and R. Tibshirani, "An introduction to the bootstrap" (1993), chapters 13, 14.
"""

import numpy as np
import numpy.typing as npt
import scipy.special

from benchmarks.evaluation.statistics.inputs import (
    CHUNK_ELEMENTS,
    FloatArray,
    as_matrix,
    rounding_of,
)
from benchmarks.evaluation.statistics.records import DEFAULT_RESAMPLING, RESAMPLES, Resampling
from g2rpo.seeds import generator


def bootstrap_means(
    scores: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> FloatArray:
    """Means over prompts drawn with replacement, the same draws for every row of ``scores``.

    Rows that share their prompts are thereby resampled in pairs. The draws depend only on the
    seed, the number of prompts and the number of resamples.

    Args:
        scores: [quantities, prompts].
        resamples: how many times the prompts are drawn.
        seed: names the draws.

    Returns:
        [resamples, quantities], float64.

    Raises:
        ValueError: fewer than two prompts, or a score that is not finite.
    """
    matrix = as_matrix(scores, 2, "prompts")
    prompts = matrix.shape[1]
    rng = generator(seed, "bootstrap", prompts, resamples)
    chunk = max(1, CHUNK_ELEMENTS // prompts)
    means = np.empty((resamples, matrix.shape[0]))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(0, prompts, size=(size, prompts))
        # How often each prompt was drawn turns the resampled means into one matrix product.
        drawn += np.arange(size)[:, None] * prompts
        counts = np.bincount(drawn.ravel(), minlength=size * prompts).reshape(size, prompts)
        means[start : start + size] = counts.astype(np.float64) @ matrix.T
    means /= prompts
    return means


def bootstrap_ends(
    scores: npt.ArrayLike,
    resampling: Resampling = DEFAULT_RESAMPLING,
    rounding: FloatArray | None = None,
) -> FloatArray:
    """Lower and upper ends of the bootstrap interval of each row's mean.

    Args:
        scores: [quantities, prompts].
        resampling: level, resamples, draws and kind.
        rounding: [quantities]: a row that spreads no more than this is constant, and its interval
            is its mean. None takes the rounding of the scores themselves.

    Returns:
        [2, quantities], float64; never NaN.

    Raises:
        ValueError: fewer than two prompts, or a score that is not finite.
    """
    matrix = as_matrix(scores, 2, "prompts")
    means = bootstrap_means(matrix, resamples=resampling.resamples, seed=resampling.seed)
    rounding = rounding_of(matrix) if rounding is None else rounding
    tail = (1 - resampling.level) / 2
    if resampling.kind == "percentile":
        ends: FloatArray = np.quantile(means, [tail, 1 - tail], axis=0)
    else:
        tails = _bca_tails(matrix, means, np.array([tail, 1 - tail]), rounding)
        ends = _column_quantiles(means, tails)
    return np.where(np.ptp(matrix, axis=1) <= rounding, matrix.mean(axis=1), ends)


def _bca_tails(
    matrix: FloatArray, means: FloatArray, tails: FloatArray, rounding: FloatArray
) -> FloatArray:
    """The probabilities [2, quantities] at which BCa reads the resampled means' quantiles."""
    observed = matrix.mean(axis=1)
    # Resampled means that tie with the observed one, as discrete scores give, count half.
    below = (means < observed - rounding).mean(axis=0)
    share = (below + (means <= observed + rounding).mean(axis=0)) / 2
    # None or all of the resamples on one side would put the bias correction at infinity.
    least = 0.5 / len(means)
    bias = scipy.special.ndtri(np.clip(share, least, 1 - least))
    reach = bias + scipy.special.ndtri(tails)[:, None]
    slack = 1 - _acceleration(matrix) * reach
    moved = scipy.special.ndtr(bias + reach / np.where(slack > 0, slack, 1.0))
    # The correction has a pole; past it the end is the outermost resample.
    return np.where(slack > 0, moved, np.where(reach > 0, 1.0, 0.0))


def _acceleration(matrix: FloatArray) -> FloatArray:
    """The mean's acceleration [quantities]: its jackknife has the closed form skewness / 6√n."""
    deviations = matrix - matrix.mean(axis=1, keepdims=True)
    # Relative to the largest, so that no square or cube vanishes.
    largest = np.abs(deviations).max(axis=1, keepdims=True)
    deviations /= np.where(largest > 0, largest, 1.0)
    squares = (deviations**2).sum(axis=1)
    cubes: FloatArray = (deviations**3).sum(axis=1)
    return cubes / (6 * np.where(squares > 0, squares, 1.0) ** 1.5)


def _column_quantiles(means: FloatArray, probabilities: FloatArray) -> FloatArray:
    """Quantiles of each column at its own probabilities [2, quantities], linear in between."""
    ordered = np.sort(means.T, axis=1).T
    last = len(means) - 1
    place = probabilities * last
    below = np.floor(place).astype(np.intp)
    low = np.take_along_axis(ordered, below, axis=0)
    high = np.take_along_axis(ordered, np.minimum(below + 1, last), axis=0)
    quantiles: FloatArray = low + (place - below) * (high - low)
    return quantiles
