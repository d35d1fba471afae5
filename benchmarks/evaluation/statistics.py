"""Confidence intervals, paired comparisons, and the way their numbers are printed.

Two questions are kept apart by a label that every number carries:

``checkpoint``
    How well do *these trained weights* do on prompts like the held-out ones? The prompts are the
    sample: bootstrap over prompts; paired differences with a sign-flip permutation test.
``method``
    How well does *the method* do on these prompts when it is trained again? The seeds are the
    sample: Student's t on the seed means; paired differences with the paired t-test. Needs three
    seeds.

A checkpoint interval says nothing about another training seed, and a method interval nothing about
other prompts, so neither is ever shown as the other. Matrices have one row for each independent
quantity (a reward column, say), all measured on the same prompts or seeds, and share one set of
resamples. ``docs/statistics.md`` has the definitions, the simulated coverage and the sources.

Shapes: scores are float64 [quantities, seeds, prompts], or lack an axis that has been averaged. A
model without seeds, such as the base, has one. ``first`` and ``second`` are paired: the same
quantities, seeds and prompts. ``resamples`` is how often prompts or signs are drawn. Every function
raises ValueError for another shape, arrays that are not paired, values that are not finite, and
fewer than two prompts (checkpoint) or three seeds (method).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from g2rpo.seeds import generator

FloatArray = npt.NDArray[np.float64]
Key = TypeVar("Key")
Label = Literal["checkpoint", "method"]

MIN_SEEDS = 3
"""Fewest seeds from which anything is said about a method."""
LEVEL = 0.95
"""Nominal coverage of every two-sided interval."""
ALPHA = 0.05
"""A corrected p-value below it is statistically significant."""
RESAMPLES = 10_000
CHUNK_ELEMENTS = 4_000_000
"""Resampled entries held in memory at once (32 MB as float64)."""


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval.

    Attributes:
        mean: the estimate; with several seeds, the mean over seeds and prompts.
        low: lower end.
        high: upper end.
        about: the label of the module's docstring.
        count: independent units behind it: prompts (checkpoint) or seeds (method).
        level: nominal coverage.
    """

    mean: float
    low: float
    high: float
    about: Label
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
        about: the label of the module's docstring.
        count: number of paired prompts or seeds.
        level: nominal coverage of the interval.
    """

    difference: float
    low: float
    high: float
    p_value: float
    about: Label
    count: int
    level: float = LEVEL


# --- inputs --------------------------------------------------------------------------------------


def _array(values: npt.ArrayLike, *units: str, least: int = 1) -> FloatArray:
    """Finite float64 [quantities, units...] with at least ``least`` of every unit.

    Raises:
        ValueError: another shape, too few units, or a value that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 + len(units):
        raise ValueError(f"expected [quantities, {', '.join(units)}], got shape {array.shape}")
    for unit, count in zip(units, array.shape[1:], strict=True):
        if count < least:
            raise ValueError(f"needs at least {least} {unit}, got {count}")
    if not np.isfinite(array).all():
        raise ValueError(f"a value is not finite in an array of shape {array.shape}")
    return array


def _paired_differences(
    first: npt.ArrayLike, second: npt.ArrayLike, unit: str, least: int
) -> tuple[FloatArray, FloatArray]:
    """Differences [quantities, units], and below which size one is only rounding, [quantities]."""
    one, two = _array(first, unit, least=least), _array(second, unit, least=least)
    if one.shape != two.shape:
        raise ValueError(f"not paired: shapes {one.shape} and {two.shape} differ")
    return one - two, np.maximum(_rounding(one), _rounding(two))


def _rounding(matrix: FloatArray) -> FloatArray:
    """The size below which a mean of each row of [quantities, units] is only rounding."""
    size: FloatArray = 8 * np.finfo(np.float64).eps * np.abs(matrix).max(axis=1)
    return size


# --- intervals -----------------------------------------------------------------------------------


def bootstrap_means(scores: npt.ArrayLike, *, resamples: int = RESAMPLES) -> FloatArray:
    """Means [resamples, quantities] over prompts drawn with replacement from [quantities, prompts].

    Every row has the same draws, so rows that share their prompts are resampled in pairs. The draws
    depend only on the number of prompts and the number of resamples.
    """
    matrix = _array(scores, "prompts", least=2)
    prompts = matrix.shape[1]
    counts = _counts if resamples * prompts > CHUNK_ELEMENTS else _cached_counts
    sums = np.concatenate([part @ matrix.T for part in counts(prompts, resamples)])
    means: FloatArray = sums / prompts
    return means


def _counts(prompts: int, resamples: int) -> Iterator[FloatArray]:
    """How often each resample has each prompt, in chunks of [resamples, prompts].

    Counts turn the resampled means into one matrix product.
    """
    rng = generator(0, "bootstrap", prompts, resamples)
    for size in _chunks(resamples, prompts):
        drawn = rng.integers(0, prompts, size=(size, prompts))
        drawn += np.arange(size)[:, None] * prompts
        counts = np.bincount(drawn.ravel(), minlength=size * prompts).reshape(size, prompts)
        yield counts.astype(np.float64)


@lru_cache(maxsize=1)
def _cached_counts(prompts: int, resamples: int) -> tuple[FloatArray, ...]:
    """:func:`_counts`, cached: all rows of a table and their comparisons share these draws."""
    return tuple(_counts(prompts, resamples))


def _chunks(total: int, prompts: int) -> Iterator[int]:
    """Sizes that add up to ``total``, each of at most :data:`CHUNK_ELEMENTS` entries."""
    chunk = max(1, CHUNK_ELEMENTS // prompts)
    for start in range(0, total, chunk):
        yield min(chunk, total - start)


def bootstrap_ends(
    scores: npt.ArrayLike, *, resamples: int = RESAMPLES, rounding: FloatArray | None = None
) -> FloatArray:
    """Percentile bootstrap intervals of the means of [quantities, prompts]: ends [2, quantities].

    B. Efron and R. Tibshirani, "An introduction to the bootstrap" (1993), chapter 13. A row that
    spreads no more than ``rounding`` [quantities] is constant, and its interval is its mean; None
    uses the rounding of the scores themselves. No end is NaN.
    """
    matrix = _array(scores, "prompts", least=2)
    means = bootstrap_means(matrix, resamples=resamples)
    rounding = _rounding(matrix) if rounding is None else rounding
    tail = (1 - LEVEL) / 2
    ends = np.quantile(means, [tail, 1 - tail], axis=0)
    return np.where(np.ptp(matrix, axis=1) <= rounding, matrix.mean(axis=1), ends)


def _intervals(
    means: FloatArray, low: FloatArray, high: FloatArray, label: Label, count: int
) -> list[Interval]:
    ends = zip(means, low, high, strict=True)
    return [Interval(float(mean), float(a), float(b), label, count) for mean, a, b in ends]


def checkpoint_intervals(scores: npt.ArrayLike, *, resamples: int = RESAMPLES) -> list[Interval]:
    """Bootstrap intervals over prompts, one for each row of [quantities, prompts]."""
    matrix = _array(scores, "prompts", least=2)
    low, high = bootstrap_ends(matrix, resamples=resamples)
    return _intervals(matrix.mean(axis=1), low, high, "checkpoint", matrix.shape[1])


def method_intervals(seed_means: npt.ArrayLike) -> list[Interval]:
    """Student's t intervals over seeds, one for each row of [quantities, seeds].

    They are about the mean over training seeds of the score on these very prompts.
    """
    matrix = _array(seed_means, "seeds", least=MIN_SEEDS)
    means, half = matrix.mean(axis=1), _t_half_width(matrix)
    return _intervals(means, means - half, means + half, "method", matrix.shape[1])


def _t_half_width(matrix: FloatArray) -> FloatArray:
    """Half the width of Student's t interval of each row's mean: [quantities]."""
    from scipy.stats import t  # which takes a second to import

    count = matrix.shape[1]
    quantile = float(t.ppf((1 + LEVEL) / 2, count - 1))
    width: FloatArray = quantile * matrix.std(axis=1, ddof=1) / np.sqrt(count)
    return width


def row_intervals(scores: npt.ArrayLike) -> list[Interval]:
    """The intervals a table shows for one of its rows, [quantities, seeds, prompts].

    With three seeds or more they are about the method; with one or two, about those checkpoints
    (each prompt's score averaged over the seeds).
    """
    cube = _array(scores, "seeds", "prompts")
    if cube.shape[1] >= MIN_SEEDS:
        return method_intervals(cube.mean(axis=2))
    return checkpoint_intervals(cube.mean(axis=1))


# --- comparisons ---------------------------------------------------------------------------------


def sign_flip_p_values(
    differences: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    tolerance: npt.ArrayLike = 0.0,
) -> FloatArray:
    """Two-sided sign-flip permutation p-values, in (0, 1], of differences [quantities, prompts].

    Every assignment of signs is enumerated if there are at most ``resamples`` of them. Otherwise
    ``resamples`` random ones are drawn and the observed one counts as one more, so the p-value is
    valid and never 0 (B. Phipson and G. Smyth, "Permutation p-values should never be zero",
    Statistical Applications in Genetics and Molecular Biology 9, 2010). Means within ``tolerance``
    ([quantities] or a number) count as equal. One prompt is enough.
    """
    matrix = _array(differences, "prompts")
    prompts = matrix.shape[1]
    observed = np.abs(matrix.mean(axis=1))
    reached = observed - np.maximum(np.asarray(tolerance, dtype=np.float64), 1e-12 * observed)
    exact = prompts < 63 and 2**prompts <= resamples
    total = 2**prompts if exact else resamples
    rng = generator(0, "sign-flip", prompts, resamples)
    as_extreme, start = np.zeros(matrix.shape[0]), 0
    for size in _chunks(total, prompts):
        if exact:
            numbers = np.arange(start, start + size)
            heads = ((numbers[:, None] >> np.arange(prompts)) & 1).astype(np.float64)
        else:
            packed = rng.integers(0, 256, size=(size, (prompts + 7) // 8), dtype=np.uint8)
            heads = np.unpackbits(packed, axis=1, count=prompts).astype(np.float64)
        flipped = np.abs((2 * heads - 1) @ matrix.T) / prompts
        as_extreme += (flipped >= reached).sum(axis=0)
        start += size
    return as_extreme / total if exact else (as_extreme + 1) / (total + 1)


def _comparisons(columns: Iterable[FloatArray], label: Label, count: int) -> list[Comparison]:
    return [
        Comparison(float(mean), float(low), float(high), float(p_value), label, count)
        for mean, low, high, p_value in zip(*columns, strict=True)
    ]


def checkpoint_comparisons(
    first: npt.ArrayLike, second: npt.ArrayLike, *, resamples: int = RESAMPLES
) -> list[Comparison]:
    """Compares trained weights, [quantities, prompts]: paired bootstrap and sign-flip test."""
    differences, rounding = _paired_differences(first, second, "prompts", 2)
    low, high = bootstrap_ends(differences, resamples=resamples, rounding=rounding)
    p_values = sign_flip_p_values(differences, resamples=resamples, tolerance=rounding)
    columns = (differences.mean(axis=1), low, high, p_values)
    return _comparisons(columns, "checkpoint", differences.shape[1])


def method_comparisons(first: npt.ArrayLike, second: npt.ArrayLike) -> list[Comparison]:
    """Compares methods by the paired t-test on means [quantities, seeds] of shared seeds.

    A model without seeds is given as its mean repeated, which makes this the one-sample t-test
    against that constant.
    """
    from scipy.stats import t  # which takes a second to import

    differences, rounding = _paired_differences(first, second, "seeds", MIN_SEEDS)
    count = differences.shape[1]
    means = differences.mean(axis=1)
    half = _t_half_width(differences)
    error = differences.std(axis=1, ddof=1) / np.sqrt(count)
    # Differences that vary by rounding only have no spread to test against: the limit of the
    # t-test is then 0, or 1 where the mean itself is rounding. SciPy would warn and return NaN.
    flat = error <= rounding
    statistic = means / np.where(flat, 1.0, error)
    tested = 2 * t.sf(np.abs(statistic), count - 1)
    p_values = np.where(flat, np.where(np.abs(means) <= rounding, 1.0, 0.0), tested)
    return _comparisons((means, means - half, means + half, p_values), "method", count)


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Holm's step-down adjusted p-values: below 0.05 keeps the family-wise error below 0.05.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6 (1979). In the order given, none below the given one or above 1.

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


# --- probability of improvement ------------------------------------------------------------------


def wins(first: npt.ArrayLike, second: npt.ArrayLike) -> FloatArray:
    """1 where ``first`` scores higher, 1/2 where they tie, 0 elsewhere; of the scores' shape.

    Their mean is the probability of improvement. R. Agarwal et al., "Deep reinforcement learning
    at the edge of the statistical precipice" (NeurIPS 2021), average P(X > Y) over tasks, with
    every run of X against every run of Y. Here the tasks are prompts, and the runs are paired: by
    prompt, and by the training seed that both methods share.
    """
    one, two = (_array(scores, "seeds", "prompts") for scores in (first, second))
    seeds = {one.shape[1], two.shape[1]} - {1}
    if one.shape[0] != two.shape[0] or one.shape[2] != two.shape[2] or len(seeds) > 1:
        raise ValueError(f"not paired: shapes {one.shape} and {two.shape} differ")
    won: FloatArray = ((one > two).astype(np.float64) + (one >= two)) / 2
    return won


def checkpoint_improvements(
    first: npt.ArrayLike, second: npt.ArrayLike, *, resamples: int = RESAMPLES
) -> list[Interval]:
    """Probability that these trained weights score higher on a prompt like the held-out ones."""
    return share_intervals(wins(first, second).mean(axis=1), resamples=resamples)


def share_intervals(shares: FloatArray, *, resamples: int = RESAMPLES) -> list[Interval]:
    """Bootstrap intervals over prompts of mean shares of wins, [quantities, prompts].

    If the share is the same on every prompt, a bootstrap sees no uncertainty at all. The interval
    then leaves room for the share of other outcomes that so many prompts can miss,
    1 - (tail)^(1/prompts), as Clopper and Pearson's does.
    """
    low, high = bootstrap_ends(shares, resamples=resamples)
    means, count = shares.mean(axis=1), shares.shape[1]
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / count)
    flat = np.ptp(shares, axis=1) == 0
    low = np.where(flat, means * (1 - unseen), low)
    high = np.where(flat, means * (1 - unseen) + unseen, high)
    return _intervals(means, low, high, "checkpoint", count)


def method_improvements(first: npt.ArrayLike, second: npt.ArrayLike) -> list[Interval]:
    """Probability that the method scores higher on these prompts when both are trained again.

    Student's t interval over the seeds' shares of wins, cut at 0 and 1. The seeds are the sample
    and the prompts are fixed, so neither is resampled: three seeds have ten distinct bootstrap
    samples, far too few for an interval, and resampling runs within each prompt apart, as for the
    independent tasks of Agarwal et al., would take the prompts of one training for independent
    trainings.
    """
    return [
        replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))
        for interval in method_intervals(wins(first, second).mean(axis=2))
    ]


# --- numbers in text -----------------------------------------------------------------------------

NOTHING = "–"
"""Stands for a number that does not exist."""
_UNITS = ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"))


def human(number: float | None) -> str:
    """A count or a number of seconds in a few characters: 9,876; 17.1k; 1.71M."""
    if number is None:
        return NOTHING
    if 0 < number < 0.01:
        return "<0.01"
    if number < 10_000:
        return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"
    scaled = [(float(f"{number / unit:.3g}"), suffix) for unit, suffix in _UNITS]
    # What rounds up to 1000 of a unit is shown in the next one.
    figure, suffix = next((pair for pair in scaled if pair[0] < 1000), scaled[-1])
    return f"{figure:g}{suffix}"


def fixed(number: float, digits: int) -> str:
    """A number with ``digits`` decimals, and no minus sign before a zero."""
    text = f"{number:.{digits}f}"
    return text.removeprefix("-") if not text.strip("-0.") else text


def nonzero(number: float, digits: int) -> str:
    """A number with ``digits`` decimals, or one figure of it where these would all be zero."""
    text = fixed(number, digits)
    return f"{number:.1g}" if number and not text.strip("0.") else text


def signed(difference: float, digits: int) -> str:
    """A difference, or an end of its interval, with its sign; only zero is printed as zero."""
    text = nonzero(difference, digits)
    return f"+{text}" if difference > 0 else text


def p_text(p_value: float) -> str:
    """A p-value with three decimals, ``< 0.001`` below that, and a dash where there is none (NaN).

    What is below :data:`ALPHA` but would round up to it is ``< 0.05``: 0.050 is not significant.
    """
    if math.isnan(p_value):
        return NOTHING
    if p_value < 0.001:
        return "< 0.001"
    text = f"{p_value:.3f}"
    return f"< {ALPHA}" if p_value < ALPHA <= float(text) else text


def p_equation(p_value: float) -> str:
    """``p = 0.012`` or ``p < 0.001``, see :func:`p_text`."""
    text = p_text(p_value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"
