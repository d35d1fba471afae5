"""Intervals and comparisons against closed forms, SciPy and plain loops."""

import itertools
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.evaluation import statistics
from benchmarks.evaluation.statistics import (
    bootstrap_ends,
    bootstrap_means,
    checkpoint_comparisons,
    checkpoint_improvements,
    checkpoint_intervals,
    holm,
    method_comparisons,
    method_improvements,
    method_intervals,
    row_intervals,
    sign_flip_p_values,
    wins,
)

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_method_interval_is_the_t_interval() -> None:
    means = RNG.normal(0.3, 0.01, size=(4, 5))
    for row, interval in zip(means, method_intervals(means), strict=True):
        expected = scipy.stats.ttest_1samp(row, 0).confidence_interval(0.95)
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
        assert interval.mean == pytest.approx(row.mean())
        assert (interval.about, interval.count) == ("method", 5)


def test_method_comparison_is_the_paired_t_test() -> None:
    first, second = RNG.normal(0.3, 0.01, size=(2, 3, 4))
    for one, two, found in zip(first, second, method_comparisons(first, second), strict=True):
        expected = scipy.stats.ttest_rel(one, two)
        interval = expected.confidence_interval(0.95)
        assert found.p_value == pytest.approx(expected.pvalue)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
        assert found.difference == pytest.approx((one - two).mean())
    # A model without seeds is a constant.
    (found,) = method_comparisons(first[:1], np.full((1, 4), 0.29))
    assert found.p_value == pytest.approx(scipy.stats.ttest_1samp(first[0], 0.29).pvalue)


@pytest.mark.parametrize(("shift", "p_value"), [(0.0, 1.0), (0.1, 0.0)])
def test_method_comparison_without_spread(shift: float, p_value: float) -> None:
    seeds = np.array([[0.1, 0.3, 0.7]])
    (found,) = method_comparisons(seeds + shift, seeds)
    assert found.p_value == p_value
    assert found.difference == pytest.approx(shift)


def test_bootstrap_of_two_prompts_has_three_known_means() -> None:
    means = bootstrap_means([[0.0, 1.0]], resamples=20_000)[:, 0]
    values, counts = np.unique(means, return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    assert counts / 20_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.015)


def test_bootstrap_interval_is_nearly_normal() -> None:
    scores = RNG.normal(0.3, 0.1, size=(1, 400))
    (interval,) = checkpoint_intervals(scores)
    half = 1.96 * scores.std() / 20
    assert interval.low == pytest.approx(scores.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(scores.mean() + half, abs=0.05 * half)
    assert (interval.about, interval.count) == ("checkpoint", 400)


def test_bootstrap_resamples_rows_in_pairs() -> None:
    first, second = RNG.normal(size=(2, 30))
    both = bootstrap_means([first, second, first - second], resamples=200)
    assert both[:, 0] - both[:, 1] == pytest.approx(both[:, 2])


def test_bootstrap_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = RNG.normal(size=(2, 33))
    whole = bootstrap_means(scores, resamples=500)
    monkeypatch.setattr(statistics, "CHUNK_ELEMENTS", 33 * 7)
    assert bootstrap_means(scores, resamples=500) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7, 1e-300])
@pytest.mark.parametrize("prompts", [2, 3, 400])
def test_constant_scores_have_their_value_as_interval(value: float, prompts: int) -> None:
    (found,) = checkpoint_intervals(np.full((1, prompts), value), resamples=200)
    assert found.low == found.mean == found.high == pytest.approx(value)


def test_a_constant_shift_is_known_without_doubt() -> None:
    scores = RNG.normal(0.3, 0.1, size=(1, 50))
    (found,) = checkpoint_comparisons(scores + 0.1, scores, resamples=500)
    # The differences differ from each other by rounding only.
    assert found.low == found.difference == found.high == pytest.approx(0.1)
    assert found.p_value == pytest.approx(1 / 501)
    (equal,) = checkpoint_comparisons(scores, scores)
    assert (equal.difference, equal.low, equal.high, equal.p_value) == (0, 0, 0, 1)


def test_sign_flip_enumerates_small_samples() -> None:
    differences = np.array([[0.3, 0.1, 0.4, -0.2, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0]])
    expected = []
    for row in differences:
        means = [abs(np.dot(s, row)) for s in itertools.product((-1, 1), repeat=5)]
        expected.append(np.mean([mean >= abs(row.sum()) - 1e-12 for mean in means]))
    assert sign_flip_p_values(differences).tolist() == expected
    assert expected[1] == 2 / 2**5


def test_checkpoint_comparison_pairs_the_prompts() -> None:
    prompts = RNG.normal(0, 1.0, size=(1, 100))
    better = prompts + 0.02 + RNG.normal(0, 0.02, size=(1, 100))
    (found,) = checkpoint_comparisons(better, prompts)
    assert 0 < found.low < found.difference < found.high
    assert found.p_value < 0.001
    # Unpaired, so small a shift drowns in the differences between prompts.
    assert scipy.stats.ttest_ind(better[0], prompts[0]).pvalue > 0.5


def test_row_intervals_choose_the_label() -> None:
    cube = RNG.normal(size=(2, 3, 10))
    assert {interval.about for interval in row_intervals(cube)} == {"method"}
    assert row_intervals(cube) == method_intervals(cube.mean(axis=2))
    two = row_intervals(cube[:, :2])
    assert two == checkpoint_intervals(cube[:, :2].mean(axis=1))
    assert {interval.count for interval in two} == {10}


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_bounds(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert (adjusted >= np.array(p_values)).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p_values, kind="stable")]) >= 0).all()
    assert adjusted.min() == pytest.approx(min(1.0, len(p_values) * min(p_values)))


@given(
    st.lists(st.floats(-10, 10), min_size=2, max_size=12),
    st.floats(-5, 5),
    st.floats(0.1, 10),
)
def test_intervals_move_and_stretch_with_the_scores(
    scores: list[float], shift: float, scale: float
) -> None:
    plain = checkpoint_intervals([scores], resamples=100)[0]
    moved = checkpoint_intervals([[scale * s + shift for s in scores]], resamples=100)[0]
    assert moved.low == pytest.approx(scale * plain.low + shift, abs=1e-9)
    assert moved.high == pytest.approx(scale * plain.high + shift, abs=1e-9)
    assert min(scores) - 1e-9 <= plain.low <= plain.high <= max(scores) + 1e-9


def test_wins_in_plain_loops() -> None:
    first, second = RNG.integers(0, 3, size=(2, 2, 3, 7)).astype(float)
    won = wins(first, second)
    for place in np.ndindex(first.shape):
        one, two = first[place], second[place]
        assert won[place] == (1.0 if one > two else 0.5 if one == two else 0.0)
    assert wins(second, first) == pytest.approx(1 - won)


def test_both_labels_estimate_the_same_probability() -> None:
    first, base = RNG.normal(0.2, 1.0, size=(2, 3, 40)), RNG.normal(size=(2, 1, 40))
    prompts = checkpoint_improvements(first, base, resamples=500)
    seeds = method_improvements(first, base)
    for row, (one, other) in enumerate(zip(prompts, seeds, strict=True)):
        by_hand = np.mean([first[row, s, p] > base[row, 0, p] for s in range(3) for p in range(40)])
        assert one.mean == pytest.approx(by_hand)
        assert other.mean == pytest.approx(by_hand)
        assert (one.about, one.count, other.about, other.count) == ("checkpoint", 40, "method", 3)


def test_improvement_intervals_are_of_the_shares_of_wins() -> None:
    first, second = RNG.normal(size=(2, 1, 3, 50))
    shares = wins(first, second)
    assert checkpoint_improvements(first, second) == checkpoint_intervals(shares.mean(axis=1))
    (seeds,) = method_improvements(first, second)
    (expected,) = method_intervals(shares.mean(axis=2))
    assert (seeds.low, seeds.high) == (max(0, expected.low), min(1, expected.high))


def test_a_win_on_every_prompt_is_not_certainty() -> None:
    scores = RNG.normal(size=(1, 1, 400))
    (won,) = checkpoint_improvements(scores + 1, scores, resamples=200)
    (lost,) = checkpoint_improvements(scores, scores + 1, resamples=200)
    (tied,) = checkpoint_improvements(scores, scores, resamples=200)
    exact = scipy.stats.binomtest(400, 400).proportion_ci(0.95)
    assert (won.mean, won.high) == (1, 1)
    assert won.low == pytest.approx(exact.low)
    assert (lost.low, lost.high) == pytest.approx((0, 1 - won.low))
    assert tied.mean == 0.5
    assert (tied.low + tied.high, tied.high - tied.low) == pytest.approx((1, 1 - won.low))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    cube, fine = np.zeros((2, 3, 5)), np.zeros((2, 3, 5))
    cube[1, 2, 3] = bad
    for refuse in (
        lambda: bootstrap_means(cube[1]),
        lambda: bootstrap_ends(cube[1]),
        lambda: row_intervals(cube),
        lambda: checkpoint_comparisons(fine[1], cube[1]),
        lambda: checkpoint_improvements(fine, cube),
        lambda: method_improvements(cube, fine),
    ):
        with pytest.raises(ValueError, match="not finite"):
            refuse()


def test_what_cannot_be_answered_is_refused() -> None:
    cube = np.zeros((2, 3, 5))
    for message, refuse in (
        ("at least 3 seeds, got 2", lambda: method_intervals([[0.1, 0.2]])),
        ("at least 3 seeds, got 2", lambda: method_improvements(cube[:, :2], cube[:, :2])),
        ("at least 2 prompts, got 1", lambda: checkpoint_intervals([[0.1]])),
        ("at least 2 prompts", lambda: checkpoint_improvements(cube[:, :, :1], cube[:, :, :1])),
        ("not paired", lambda: checkpoint_comparisons([[0.1, 0.2]], [[0.1, 0.2, 0.3]])),
        ("not paired", lambda: wins(cube, cube[:, :2])),
        ("not paired", lambda: wins(cube, cube[:, :, :4])),
        ("not paired", lambda: wins(cube, cube[:1])),
        ("expected \\[quantities, seeds, prompts\\]", lambda: wins(cube[0], cube[0])),
        ("shape", lambda: row_intervals([[0.1, 0.2]])),
        ("between 0 and 1", lambda: holm([0.5, 1.5])),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()
