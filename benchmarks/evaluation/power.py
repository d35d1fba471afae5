"""The smallest difference that a paired t-test over seeds would probably have found."""

import math

import scipy.optimize
import scipy.stats

from benchmarks.evaluation.statistics import ALPHA, LEVEL, MIN_SEEDS

POWER = 0.8
"""Probability with which a difference of the detectable size is found."""


def t_test_power(noncentrality: float, count: int, alpha: float = ALPHA) -> float:
    """Probability that the two-sided paired t-test of ``count`` pairs rejects at ``alpha``.

    J. Cohen, "Statistical power analysis for the behavioral sciences" (1988), chapter 2. The
    statistic has a noncentral t distribution, and its square a noncentral F.

    Args:
        noncentrality: the true difference divided by its standard error, sd / sqrt(count).
        count: number of pairs.
        alpha: level of the test.
    """
    freedom = count - 1
    critical = float(scipy.stats.t.isf(alpha / 2, freedom))
    # SciPy's noncentral t is NaN in its far tails, and its noncentral F is wrong at exactly 0.
    squared = max(noncentrality**2, 1e-12)
    return float(scipy.stats.ncf.sf(critical**2, 1, freedom, squared))


def detectable_difference(deviation: float, seeds: int, *, comparisons: int = 1) -> float:
    """The true difference that is significant with probability :data:`POWER`.

    Args:
        deviation: standard deviation, over seeds, of the difference of two methods.
        seeds: number of seeds that they share.
        comparisons: number that Holm's correction is over. The level is the one of its first step,
            0.05 / ``comparisons``, so that the others need no smaller one.

    Returns:
        The difference, in the unit of ``deviation``.

    Raises:
        ValueError: fewer than three seeds or one comparison, or a deviation out of its range.
    """
    if seeds < MIN_SEEDS or comparisons < 1 or not 0 <= deviation < math.inf:
        raise ValueError(
            f"needs at least {MIN_SEEDS} seeds, 1 comparison and a finite deviation of 0 or more"
        )
    alpha = ALPHA / comparisons

    def missing(noncentrality: float) -> float:
        return t_test_power(noncentrality, seeds, alpha) - POWER

    most = 1.0
    while missing(most) < 0:
        most *= 2
    noncentrality = float(scipy.optimize.brentq(missing, 0.0, most))
    return noncentrality * deviation / math.sqrt(seeds)


def interval_deviation(low: float, high: float, count: int) -> float:
    """The standard deviation of ``count`` values whose mean has this Student's t interval."""
    quantile = float(scipy.stats.t.ppf((1 + LEVEL) / 2, count - 1))
    return (high - low) / 2 / quantile * math.sqrt(count)
