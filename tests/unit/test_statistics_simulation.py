"""Simulated scores with known expectations: what each label's interval covers, and what not.

score[seed, prompt] = mean + seed effect + prompt effect + noise. A checkpoint's target is the mean
plus its own seed's effect, over new prompts; a method's target is the mean over new seeds, on the
prompts at hand. 2,000 data sets make the standard error of a coverage of 95 % half a point.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import scipy.special
import scipy.stats

from benchmarks.evaluation.statistics import (
    Comparison,
    Interval,
    checkpoint_comparisons,
    checkpoint_improvements,
    checkpoint_intervals,
    holm,
    method_comparisons,
    method_improvements,
    method_intervals,
    sign_flip_p_values,
    wins,
)

Array = npt.NDArray[np.float64]

SETS = 2000
PROMPTS = 400
RESAMPLES = 1000
MEAN = 0.3
# Standard deviations. A single picture's noise is a third of the spread between prompts.
PROMPT, NOISE = 0.09, 0.03


@dataclass(frozen=True)
class World:
    """Data sets of one method: scores [sets, seeds, prompts] and the effects behind them."""

    scores: Array
    seed_effects: Array
    prompt_effects: Array


def standard(rng: np.random.Generator, shape: tuple[int, ...], skewed: bool) -> Array:
    """Draws of mean 0 and variance 1: normal, or exponential with skewness 2."""
    return rng.standard_exponential(shape) - 1 if skewed else rng.standard_normal(shape)


def simulate(key: int, seeds: int, seed_sd: float, skewed: bool = False) -> World:
    rng = np.random.default_rng(key)
    seed_effects = seed_sd * rng.standard_normal((SETS, seeds))
    prompt_effects = PROMPT * standard(rng, (SETS, PROMPTS), skewed)
    noise = NOISE * standard(rng, (SETS, seeds, PROMPTS), skewed)
    scores = MEAN + seed_effects[:, :, None] + prompt_effects[:, None, :] + noise
    return World(scores, seed_effects, prompt_effects)


@dataclass(frozen=True)
class Pair:
    """Data sets of two methods on shared prompts, and what drives their difference."""

    first: Array
    second: Array
    seed_effects: Array
    """Of the difference, [sets, seeds]."""
    interactions: Array
    """How much more a prompt gains by the first method than others do, [sets, prompts]."""


SHIFT, INTERACTION = 0.002, 0.02


def simulate_pair(key: int, seeds: int, seed_sd: float, shift: float = SHIFT) -> Pair:
    rng = np.random.default_rng(key)
    effects = seed_sd * rng.standard_normal((2, SETS, seeds))
    prompts = PROMPT * standard(rng, (SETS, 1, PROMPTS), skewed=True)
    interactions = INTERACTION * rng.standard_normal((SETS, PROMPTS))
    noise = NOISE * rng.standard_normal((2, SETS, seeds, PROMPTS))
    second = MEAN + effects[1][:, :, None] + prompts + noise[1]
    first = MEAN + shift + effects[0][:, :, None] + prompts + noise[0] + interactions[:, None, :]
    return Pair(first, second, effects[0] - effects[1], interactions)


def coverage(found: list[Interval] | list[Comparison], targets: Array | float) -> float:
    ends = np.array([(one.low, one.high) for one in found])
    return float(np.mean((ends[:, 0] <= targets) & (targets <= ends[:, 1])))


@pytest.mark.parametrize(("key", "seeds", "skewed"), [(101, 1, 0), (101, 1, 1), (102, 3, 0)])
def test_checkpoint_interval_covers_these_weights_over_prompts(
    key: int, seeds: int, skewed: bool
) -> None:
    world = simulate(key, seeds, seed_sd=0.02, skewed=skewed)
    found = checkpoint_intervals(world.scores.mean(axis=1), resamples=RESAMPLES)
    assert 0.93 <= coverage(found, MEAN + world.seed_effects.mean(axis=1)) <= 0.97
    # Control: another training of the method is another question.
    assert coverage(found, MEAN) < 0.75


@pytest.mark.parametrize(("key", "seeds", "seed_sd"), [(103, 3, 0.02), (103, 5, 0.02), (104, 3, 0)])
def test_method_interval_covers_the_method_on_these_prompts(
    key: int, seeds: int, seed_sd: float
) -> None:
    world = simulate(key, seeds, seed_sd, skewed=seed_sd > 0)
    found = method_intervals(world.scores.mean(axis=2))
    assert 0.93 <= coverage(found, MEAN + world.prompt_effects.mean(axis=1)) <= 0.97
    if seed_sd == 0:  # Control: over other prompts it claims nothing.
        assert coverage(found, MEAN) < 0.85


def test_checkpoint_comparison_covers_these_weights_over_prompts() -> None:
    pair = simulate_pair(105, seeds=1, seed_sd=0.01)
    found = checkpoint_comparisons(pair.first[:, 0], pair.second[:, 0], resamples=RESAMPLES)
    assert 0.93 <= coverage(found, SHIFT + pair.seed_effects[:, 0]) <= 0.97
    assert coverage(found, SHIFT) < 0.5


@pytest.mark.parametrize(("seeds", "seed_sd"), [(3, 0.01), (5, 0.01), (3, 0.0)])
def test_method_comparison_covers_the_methods_on_these_prompts(seeds: int, seed_sd: float) -> None:
    pair = simulate_pair(106, seeds, seed_sd)
    found = method_comparisons(pair.first.mean(axis=2), pair.second.mean(axis=2))
    covered = coverage(found, SHIFT + pair.interactions.mean(axis=1))
    assert covered >= 0.93
    assert covered <= 0.97 or seed_sd == 0


def test_checkpoint_improvement_covers() -> None:
    pair = simulate_pair(107, seeds=1, seed_sd=0.01)
    found = checkpoint_improvements(pair.first, pair.second, resamples=RESAMPLES)
    spread = np.hypot(INTERACTION, 2**0.5 * NOISE)
    targets = scipy.special.ndtr((SHIFT + pair.seed_effects[:, 0]) / spread)
    assert 0.93 <= coverage(found, targets) <= 0.97


def improvement_targets(pair: Pair, seed_sd: float) -> Array:
    """Expected share of wins on each data set's own prompts, over seeds and noise."""
    spread = (2 * (seed_sd**2 + NOISE**2)) ** 0.5
    shares: Array = scipy.special.ndtr((SHIFT + pair.interactions) / spread).mean(axis=1)
    return shares


@pytest.mark.parametrize("seeds", [3, 5])
def test_method_improvement_covers(seeds: int) -> None:
    pair = simulate_pair(108, seeds, seed_sd=0.01)
    targets = improvement_targets(pair, seed_sd=0.01)
    found = method_improvements(pair.first, pair.second)
    assert 0.93 <= coverage(found, targets) <= 0.97
    # Control: a bootstrap over so few seeds is too narrow.
    shares = wins(pair.first, pair.second).mean(axis=2)
    assert coverage(checkpoint_intervals(shares, resamples=RESAMPLES), targets) < 0.88


def test_trainings_resampled_within_each_prompt_are_not_independent() -> None:
    pair, rng, covered = simulate_pair(108, seeds=3, seed_sd=0.01), np.random.default_rng(115), []
    targets = improvement_targets(pair, seed_sd=0.01)
    for won, target in zip(wins(pair.first, pair.second)[:200], targets, strict=False):
        drawn = rng.integers(0, 3, size=(200, 3, PROMPTS))
        low, high = np.quantile(won[drawn, np.arange(PROMPTS)].mean(axis=(1, 2)), [0.025, 0.975])
        covered.append(low <= target <= high)
    assert np.mean(covered) < 0.5


def uniform(p_values: Array) -> None:
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01
    for level in (0.01, 0.05, 0.2):
        error = (level * (1 - level) / len(p_values)) ** 0.5
        assert np.mean(p_values <= level) == pytest.approx(level, abs=3 * error)


def test_permutation_p_values_are_uniform_under_the_null() -> None:
    rng = np.random.default_rng(110)
    # Symmetric about 0, with heavy tails and a spread that differs from prompt to prompt.
    differences = rng.gamma(2.0, 0.01, size=PROMPTS) * rng.standard_t(4, size=(SETS, PROMPTS))
    uniform(sign_flip_p_values(differences, resamples=1999))


def test_checkpoint_p_values_are_uniform_under_the_null() -> None:
    pair = simulate_pair(111, seeds=1, seed_sd=0.0, shift=0.0)
    found = checkpoint_comparisons(pair.first[:, 0], pair.second[:, 0], resamples=1999)
    uniform(np.array([one.p_value for one in found]))


@pytest.mark.parametrize("seeds", [3, 5])
def test_method_p_values_are_uniform_under_the_null(seeds: int) -> None:
    pair = simulate_pair(112, seeds, seed_sd=0.01, shift=0.0)
    # On fixed prompts the null is an expected difference of 0 on them.
    first = pair.first - pair.interactions.mean(axis=1)[:, None, None]
    found = method_comparisons(first.mean(axis=2), pair.second.mean(axis=2))
    uniform(np.array([one.p_value for one in found]))


def test_checkpoint_test_mistakes_one_lucky_seed_for_the_method() -> None:
    # Control: equal methods, yet their trained weights do differ, and the test rightly finds it.
    pair = simulate_pair(113, seeds=1, seed_sd=0.01, shift=0.0)
    found = checkpoint_comparisons(pair.first[:, 0], pair.second[:, 0], resamples=RESAMPLES)
    assert np.mean([one.p_value < 0.05 for one in found]) > 0.5


def test_holm_keeps_the_family_wise_error() -> None:
    rng = np.random.default_rng(114)
    members = 12
    # All members share a baseline, so their differences are correlated.
    differences = rng.standard_normal((SETS, members, 100)) - rng.standard_normal((SETS, 1, 100))
    p_values = sign_flip_p_values(differences.reshape(-1, 100), resamples=999)
    families = p_values.reshape(SETS, members)
    corrected = np.array([holm(family) for family in families])
    assert np.mean((corrected < 0.05).any(axis=1)) <= 0.05 + 3 * (0.05 * 0.95 / SETS) ** 0.5
    # Control: without the correction one of twelve is found far too often.
    assert np.mean((families < 0.05).any(axis=1)) > 0.2
