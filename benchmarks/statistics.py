"""Intervals and paired comparisons for tables of scores.

Two questions are kept apart by a label that every number carries:

``checkpoint``
    How well do *these trained weights* do on prompts like the held-out ones? The prompts are the
    sample: bootstrap over prompts; paired differences with a sign-flip permutation test.
``method``
    How well does *the method* do when it is trained again? The seeds are the sample: Student's t
    on the seed means; paired differences with the paired t-test. Needs three seeds.

A checkpoint interval says nothing about another training seed, so it is never shown as the other.
All functions take matrices whose rows are independent quantities (reward columns, say) measured
on the same prompts or seeds, and draw one set of resamples for all of them.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.stats

from g2rpo.seeds import generator

Label = Literal["checkpoint", "method"]
FloatArray = npt.NDArray[np.float64]

MIN_SEEDS = 3
"""Fewest seeds from which anything is said about a method."""

LEVEL = 0.95
RESAMPLES = 10_000
_CHUNK_ELEMENTS = 4_000_000
"""Resampled entries held in memory at once (32 MB as float64)."""


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval.

    Attributes:
        mean: the estimate; for several seeds the mean over seeds and prompts.
        low: lower end at the level asked for (95 % unless told otherwise).
        high: upper end.
        label: what the interval is about, see the module's docstring.
        count: independent units behind it: prompts (checkpoint) or seeds (method).
    """

    mean: float
    low: float
    high: float
    label: Label
    count: int


@dataclass(frozen=True)
class Comparison:
    """The paired difference ``first - second`` with its interval and two-sided p-value.

    Attributes:
        difference: mean paired difference, in the score's own unit.
        low: lower end of its interval.
        high: upper end.
        p_value: sign-flip permutation test (checkpoint) or paired t-test (method).
        label: what is compared, see the module's docstring.
        count: prompts or seeds that were paired.
    """

    difference: float
    low: float
    high: float
    p_value: float
    label: Label
    count: int


def _matrix(values: npt.ArrayLike, least: int, unit: str) -> FloatArray:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"expected [quantities, {unit}], got an array of shape {matrix.shape}")
    if matrix.shape[1] < least:
        raise ValueError(f"needs at least {least} {unit}, got {matrix.shape[1]}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"a value is not finite in an array of shape {matrix.shape}")
    return matrix


def _paired(
    first: npt.ArrayLike, second: npt.ArrayLike, least: int, unit: str
) -> tuple[FloatArray, FloatArray]:
    """Differences, and the size below which one is only rounding of the scores it comes from."""
    one, two = _matrix(first, least, unit), _matrix(second, least, unit)
    if one.shape != two.shape:
        raise ValueError(f"not paired: shapes {one.shape} and {two.shape} differ")
    scale = np.maximum(np.abs(one).max(axis=1), np.abs(two).max(axis=1))
    return one - two, 8 * np.finfo(np.float64).eps * scale


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
    """
    matrix = _matrix(scores, 2, "prompts")
    prompts = matrix.shape[1]
    rng = generator(seed, "bootstrap", prompts, resamples)
    chunk = max(1, _CHUNK_ELEMENTS // prompts)
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


def _percentiles(means: FloatArray, level: float) -> FloatArray:
    tail = (1 - level) / 2
    ends: FloatArray = np.quantile(means, [tail, 1 - tail], axis=0)
    return ends


def checkpoint_intervals(
    scores: npt.ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """Percentile bootstrap intervals over prompts, one for each row of [quantities, prompts].

    Raises:
        ValueError: fewer than two prompts, or a score that is not finite.
    """
    matrix = _matrix(scores, 2, "prompts")
    low, high = _percentiles(bootstrap_means(matrix, resamples=resamples, seed=seed), level)
    return [
        Interval(float(mean), float(a), float(b), "checkpoint", matrix.shape[1])
        for mean, a, b in zip(matrix.mean(axis=1), low, high, strict=True)
    ]


def method_intervals(seed_means: npt.ArrayLike, *, level: float = LEVEL) -> list[Interval]:
    """Student's t intervals over seeds, one for each row of [quantities, seeds].

    Raises:
        ValueError: fewer than three seeds, or a mean that is not finite.
    """
    matrix = _matrix(seed_means, MIN_SEEDS, "seeds")
    count = matrix.shape[1]
    means, half = matrix.mean(axis=1), _t_half_width(matrix, level)
    return [
        Interval(float(mean), float(mean - width), float(mean + width), "method", count)
        for mean, width in zip(means, half, strict=True)
    ]


def _t_half_width(matrix: FloatArray, level: float) -> FloatArray:
    count = matrix.shape[1]
    quantile = float(scipy.stats.t.ppf((1 + level) / 2, count - 1))
    width: FloatArray = quantile * matrix.std(axis=1, ddof=1) / np.sqrt(count)
    return width


def row_intervals(
    scores: npt.ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """The intervals a table shows for one of its rows.

    With three seeds or more they are about the method; with one or two, about those checkpoints
    (each prompt's score averaged over the seeds).

    Args:
        scores: [quantities, seeds, prompts]; a base model has one "seed".
        level: two-sided coverage aimed at.
        resamples: bootstrap resamples.
        seed: names the bootstrap's draws.
    """
    cube = np.asarray(scores, dtype=np.float64)
    if cube.ndim != 3:
        raise ValueError(f"expected [quantities, seeds, prompts], got shape {cube.shape}")
    if cube.shape[1] >= MIN_SEEDS:
        return method_intervals(cube.mean(axis=2), level=level)
    return checkpoint_intervals(cube.mean(axis=1), level=level, resamples=resamples, seed=seed)


def sign_flip_p_values(
    differences: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    tolerance: npt.ArrayLike = 0.0,
) -> FloatArray:
    """Two-sided sign-flip permutation p-values of paired differences.

    Every assignment of signs is enumerated where there are at most ``resamples`` of them;
    otherwise ``resamples`` random ones are drawn, and the one observed counts as one more, so that
    the p-value is valid and never 0.

    Args:
        differences: [quantities, prompts].
        resamples: random assignments.
        seed: names the draws.
        tolerance: [quantities] or a number: means this close count as equal.

    Returns:
        [quantities], float64 in (0, 1].
    """
    matrix = _matrix(differences, 1, "prompts")
    prompts = matrix.shape[1]
    observed = np.abs(matrix.mean(axis=1))
    reached = observed - np.maximum(np.asarray(tolerance, dtype=np.float64), 1e-12 * observed)
    exact = prompts < 63 and 2**prompts <= resamples
    total = 2**prompts if exact else resamples
    rng = generator(seed, "sign-flip", prompts, resamples)
    chunk = max(1, _CHUNK_ELEMENTS // prompts)
    as_extreme = np.zeros(matrix.shape[0])
    for start in range(0, total, chunk):
        size = min(chunk, total - start)
        if exact:
            numbers = np.arange(start, start + size)
            heads = ((numbers[:, None] >> np.arange(prompts)) & 1).astype(np.float64)
        else:
            packed = rng.integers(0, 256, size=(size, (prompts + 7) // 8), dtype=np.uint8)
            heads = np.unpackbits(packed, axis=1, count=prompts).astype(np.float64)
        flipped = np.abs((2 * heads - 1) @ matrix.T) / prompts
        as_extreme += (flipped >= reached).sum(axis=0)
    return as_extreme / total if exact else (as_extreme + 1) / (total + 1)


def checkpoint_comparisons(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """Compares trained weights on the same prompts: paired bootstrap and sign-flip test.

    Args:
        first: [quantities, prompts].
        second: the same shape and prompts.
        level: of the interval.
        resamples: of the bootstrap and of the permutation test.
        seed: names the draws.

    Raises:
        ValueError: the two are not paired, fewer than two prompts, or a score is not finite.
    """
    differences, rounding = _paired(first, second, 2, "prompts")
    means = bootstrap_means(differences, resamples=resamples, seed=seed)
    low, high = _percentiles(means, level)
    p_values = sign_flip_p_values(differences, resamples=resamples, seed=seed, tolerance=rounding)
    columns = zip(differences.mean(axis=1), low, high, p_values, strict=True)
    count = differences.shape[1]
    return [
        Comparison(float(mean), float(a), float(b), float(p), "checkpoint", count)
        for mean, a, b, p in columns
    ]


def method_comparisons(
    first: npt.ArrayLike, second: npt.ArrayLike, *, level: float = LEVEL
) -> list[Comparison]:
    """Compares methods by the paired t-test on the means of shared seeds.

    Args:
        first: [quantities, seeds], each the mean over the prompts.
        second: the same shape and seeds. A model without seeds (the untrained base) is given as
            its mean repeated, which makes this the one-sample t-test against that constant.
        level: of the interval.

    Raises:
        ValueError: the two are not paired, fewer than three seeds, or a mean is not finite.
    """
    differences, rounding = _paired(first, second, MIN_SEEDS, "seeds")
    count = differences.shape[1]
    means = differences.mean(axis=1)
    half = _t_half_width(differences, level)
    error = differences.std(axis=1, ddof=1) / np.sqrt(count)
    # Differences that vary by rounding only have no spread to test against: the limit of the
    # t-test is then 0, or 1 where the mean itself is rounding.
    flat = error <= rounding
    statistic = means / np.where(flat, 1.0, error)
    tested = 2 * scipy.stats.t.sf(np.abs(statistic), count - 1)
    p_values = np.where(flat, np.where(np.abs(means) <= rounding, 1.0, 0.0), tested)
    return [
        Comparison(float(mean), float(mean - width), float(mean + width), float(p), "method", count)
        for mean, width, p in zip(means, half, p_values, strict=True)
    ]


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Holm's step-down adjusted p-values: below 0.05 keeps the family-wise error below 0.05.

    Args:
        p_values: [comparisons], one family.

    Returns:
        The adjusted p-values in the order given, never below the given ones nor above 1.
    """
    given = np.asarray(p_values, dtype=np.float64)
    if given.ndim != 1 or not ((given >= 0) & (given <= 1)).all():
        raise ValueError("expected a list of p-values between 0 and 1")
    order = np.argsort(given, kind="stable")
    steps = given[order] * np.arange(len(given), 0, -1)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted
