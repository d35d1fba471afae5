"""Paired tests of two rows, and Holm's correction of several.

S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
Statistics 6 (1979); B. Phipson and G. Smyth, "Permutation p-values should never be zero",
Statistical Applications in Genetics and Molecular Biology 9 (2010).
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import scipy.stats

from benchmarks.evaluation.statistics.bootstrap import bootstrap_ends
from benchmarks.evaluation.statistics.inputs import (
    CHUNK_ELEMENTS,
    FloatArray,
    as_matrix,
    paired_differences,
)
from benchmarks.evaluation.statistics.intervals import t_half_width
from benchmarks.evaluation.statistics.records import (
    MIN_SEEDS,
    RESAMPLES,
    Comparison,
)
from g2rpo.seeds import generator

Key = TypeVar("Key")


def sign_flip_p_values(
    differences: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    tolerance: npt.ArrayLike = 0.0,
) -> FloatArray:
    """Two-sided sign-flip permutation p-values of paired differences.

    Every assignment of signs is enumerated where there are at most ``resamples`` of them;
    otherwise ``resamples`` random ones are drawn, and the one observed counts as one more, so that
    the p-value is valid and never 0.

    Args:
        differences: [quantities, prompts].
        resamples: random assignments.
        tolerance: [quantities] or a number: means this close count as equal.

    Returns:
        [quantities], float64 in (0, 1].

    Raises:
        ValueError: no prompt, or a difference that is not finite.
    """
    matrix = as_matrix(differences, 1, "prompts")
    prompts = matrix.shape[1]
    observed = np.abs(matrix.mean(axis=1))
    reached = observed - np.maximum(np.asarray(tolerance, dtype=np.float64), 1e-12 * observed)
    exact = prompts < 63 and 2**prompts <= resamples
    total = 2**prompts if exact else resamples
    rng = generator(0, "sign-flip", prompts, resamples)
    chunk = max(1, CHUNK_ELEMENTS // prompts)
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
    first: npt.ArrayLike, second: npt.ArrayLike, *, resamples: int = RESAMPLES
) -> list[Comparison]:
    """Compares trained weights on the same prompts: paired bootstrap and sign-flip test.

    Args:
        first: [quantities, prompts].
        second: the same shape and prompts.
        resamples: of the bootstrap and of the permutation test.

    Raises:
        ValueError: the two are not paired, fewer than two prompts, or a score is not finite.
    """
    differences, rounding = paired_differences(first, second, 2, "prompts")
    low, high = bootstrap_ends(differences, resamples=resamples, rounding=rounding)
    p_values = sign_flip_p_values(differences, resamples=resamples, tolerance=rounding)
    columns = zip(differences.mean(axis=1), low, high, p_values, strict=True)
    count = differences.shape[1]
    return [
        Comparison(float(mean), float(a), float(b), float(p), "checkpoint", count)
        for mean, a, b, p in columns
    ]


def method_comparisons(first: npt.ArrayLike, second: npt.ArrayLike) -> list[Comparison]:
    """Compares methods by the paired t-test on the means of shared seeds.

    Args:
        first: [quantities, seeds], each the mean over the prompts.
        second: the same shape and seeds. A model without seeds (the untrained base) is given as
            its mean repeated, which makes this the one-sample t-test against that constant.

    Raises:
        ValueError: the two are not paired, fewer than three seeds, or a mean is not finite.
    """
    differences, rounding = paired_differences(first, second, MIN_SEEDS, "seeds")
    count = differences.shape[1]
    means = differences.mean(axis=1)
    half = t_half_width(differences)
    error = differences.std(axis=1, ddof=1) / np.sqrt(count)
    # Differences that vary by rounding only have no spread to test against: the limit of the
    # t-test is then 0, or 1 where the mean itself is rounding.
    flat = error <= rounding
    statistic = means / np.where(flat, 1.0, error)
    tested = 2 * scipy.stats.t.sf(np.abs(statistic), count - 1)
    p_values = np.where(flat, np.where(np.abs(means) <= rounding, 1.0, 0.0), tested)
    ends = zip(means, means - half, means + half, p_values, strict=True)
    return [
        Comparison(float(mean), float(low), float(high), float(p), "method", count)
        for mean, low, high, p in ends
    ]


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Holm's step-down adjusted p-values: below 0.05 keeps the family-wise error below 0.05.

    Args:
        p_values: [comparisons], one family.

    Returns:
        The adjusted p-values in the order given, never below the given ones nor above 1.

    Raises:
        ValueError: not a list of numbers between 0 and 1.
    """
    given = np.asarray(p_values, dtype=np.float64)
    if given.ndim != 1 or not ((given >= 0) & (given <= 1)).all():
        raise ValueError("expected a list of p-values between 0 and 1")
    order = np.argsort(given, kind="stable")
    steps = given[order] * np.arange(len(given), 0, -1)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def corrected(family: Mapping[Key, Comparison]) -> dict[Key, float]:
    """The p-values of a family of comparisons after Holm's correction."""
    adjusted = holm([one.p_value for one in family.values()])
    return dict(zip(family, map(float, adjusted), strict=True))
