"""Bootstrap intervals against scipy, closed forms and plain loops; what cannot be resampled."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.evaluation.statistics import (
    Kind,
    Resampling,
    bootstrap_ends,
    bootstrap_means,
    checkpoint_comparisons,
    checkpoint_improvements,
    checkpoint_intervals,
    method_improvements,
    method_intervals,
    row_intervals,
    seed_spreads,
    wins,
)

RNG = np.random.default_rng(30)
KINDS: tuple[Kind, ...] = ("percentile", "bca")


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Drawn:
    """Resampled means in the form in which scipy takes those of an earlier call."""

    def __init__(self, means: np.ndarray) -> None:
        self.bootstrap_distribution = means


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_intervals_are_scipys_on_the_same_resamples(kind: Kind, level: float) -> None:
    scores = RNG.lognormal(0.0, 1.0, size=(4, 60))
    settings = Resampling(level, 2000, 3, kind)
    low, high = bootstrap_ends(scores, settings)
    means = bootstrap_means(scores, resamples=2000, seed=3)
    for row in range(4):
        expected = scipy.stats.bootstrap(
            (scores[row],),
            np.mean,
            n_resamples=0,
            bootstrap_result=Drawn(means[:, row]),
            confidence_level=level,
            method={"percentile": "percentile", "bca": "BCa"}[kind],
        ).confidence_interval
        assert (low[row], high[row]) == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_agree_with_scipys_own_resamples(kind: Kind) -> None:
    scores = RNG.standard_exponential((1, 80))
    (found,) = checkpoint_intervals(scores, kind=kind)
    expected = scipy.stats.bootstrap(
        (scores[0],),
        np.mean,
        n_resamples=10_000,
        method={"percentile": "percentile", "bca": "BCa"}[kind],
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = found.high - found.low
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.04 * width)


def test_bca_by_the_textbook_in_plain_loops() -> None:
    row = RNG.gamma(1.0, 1.0, size=25)
    means = bootstrap_means([row], resamples=500, seed=2)[:, 0]
    normal = scipy.stats.norm
    bias = normal.ppf(np.mean([mean < row.mean() for mean in means]))
    jackknife = np.array([np.delete(row, place).mean() for place in range(25)])
    lag = jackknife.mean() - jackknife
    acceleration = (lag**3).sum() / (6 * (lag**2).sum() ** 1.5)
    expected = []
    for tail in (0.025, 0.975):
        reach = bias + normal.ppf(tail)
        expected.append(np.quantile(means, normal.cdf(bias + reach / (1 - acceleration * reach))))
    found = bootstrap_ends([row], Resampling(resamples=500, seed=2, kind="bca"))[:, 0]
    assert found == pytest.approx(expected, rel=1e-9)


def test_bca_leans_towards_the_long_tail() -> None:
    scores = RNG.standard_exponential((1, 40))
    plain, moved = (checkpoint_intervals(scores, kind=kind)[0] for kind in KINDS)
    assert moved.low > plain.low
    assert moved.high > plain.high
    # Mirrored scores have the mirrored interval, up to the resamples that are drawn.
    mirrored = checkpoint_intervals(-scores, kind="bca")[0]
    assert (-mirrored.high, -mirrored.low) == pytest.approx((moved.low, moved.high), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.1, -3e7, 1e-300])
@pytest.mark.parametrize("prompts", [2, 3, 400])
def test_constant_scores_have_their_value_as_interval(
    kind: Kind, value: float, prompts: int
) -> None:
    (found,) = checkpoint_intervals(np.full((1, prompts), value), kind=kind, resamples=200)
    assert found.low == found.mean == found.high
    assert found.mean == pytest.approx(value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_shift_is_known_without_doubt(kind: Kind) -> None:
    scores = RNG.normal(0.3, 0.1, size=(1, 50))
    (found,) = checkpoint_comparisons(scores + 0.1, scores, kind=kind, resamples=500)
    # The differences differ from each other by rounding only.
    assert found.low == found.difference == found.high == pytest.approx(0.1)
    assert found.p_value == pytest.approx(1 / 501)


@given(
    st.lists(st.floats(-10, 10) | st.sampled_from([0.0, 1.0]), min_size=2, max_size=12),
    st.sampled_from(KINDS),
    st.sampled_from([1, 2, 50]),
    st.sampled_from([0.5, 0.95, 0.999999]),
)
def test_ends_are_ordered_and_among_the_scores(
    scores: list[float], kind: Kind, resamples: int, level: float
) -> None:
    low, high = bootstrap_ends([scores], Resampling(level, resamples, 0, kind))[:, 0]
    assert min(scores) - 1e-9 <= low <= high <= max(scores) + 1e-9


def test_one_outlier_among_many_does_not_break_bca() -> None:
    scores = np.zeros((1, 400))
    scores[0, 0] = 1.0
    low, high = bootstrap_ends(scores, Resampling(0.9999, 1000, 0, "bca"))[:, 0]
    assert 0 <= low < 1 / 400 < high <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_share_their_resamples(kind: Kind) -> None:
    scores = RNG.normal(size=(5, 30))
    together = checkpoint_intervals(scores, kind=kind, resamples=300)
    alone = [checkpoint_intervals(row[None], kind=kind, resamples=300)[0] for row in scores]
    for one, other in zip(together, alone, strict=True):
        assert (one.low, one.high) == pytest.approx((other.low, other.high), rel=1e-9)


def test_tables_can_ask_for_bca_and_another_level() -> None:
    cube = RNG.standard_exponential((2, 2, 20))
    (first, _) = row_intervals(cube, kind="bca", level=0.9)
    assert first == checkpoint_intervals(cube.mean(axis=1), kind="bca", level=0.9)[0]
    assert first.level == 0.9
    assert method_intervals(cube.mean(axis=1), level=0.8)[0].level == 0.8


def test_seed_spread_divides_by_seeds_less_one() -> None:
    by_hand, constant = seed_spreads([[1.0, 2.0, 4.0], [0.1, 0.1, 0.1]])
    assert by_hand.mean == pytest.approx(7 / 3)
    # Deviations -4/3, -1/3 and 5/3: squares sum to 42/9.
    assert by_hand.std == pytest.approx((42 / 9 / 2) ** 0.5)
    assert (constant.std, constant.count) == (0.0, 3)
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        seed_spreads([[0.3]])


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
        assert (one.label, one.count) == ("checkpoint", 40)
        assert (other.label, other.count) == ("method", 3)
        assert 0 <= other.low <= other.high <= 1


def test_improvement_intervals_are_of_the_shares_of_wins() -> None:
    first, second = RNG.normal(size=(2, 1, 3, 50))
    (prompts,) = checkpoint_improvements(first, second, kind="bca")
    shares = wins(first, second)
    assert prompts == checkpoint_intervals(shares.mean(axis=1), kind="bca")[0]
    (seeds,) = method_improvements(first, second)
    (expected,) = method_intervals(shares.mean(axis=2))
    assert (seeds.low, seeds.high) == (max(0, expected.low), min(1, expected.high))


@pytest.mark.parametrize("kind", KINDS)
def test_a_win_on_every_prompt_is_not_certainty(kind: Kind) -> None:
    scores = RNG.normal(size=(1, 1, 400))
    (won,) = checkpoint_improvements(scores + 1, scores, kind=kind, resamples=200)
    (lost,) = checkpoint_improvements(scores, scores + 1, kind=kind, resamples=200)
    (tied,) = checkpoint_improvements(scores, scores, kind=kind, resamples=200)
    exact = scipy.stats.binomtest(400, 400).proportion_ci(0.95)
    assert (won.mean, won.high) == (1, 1)
    assert won.low == pytest.approx(exact.low)
    assert (lost.low, lost.high) == pytest.approx((0, 1 - won.low))
    assert tied.mean == 0.5
    assert (tied.low + tied.high, tied.high - tied.low) == pytest.approx((1, 1 - won.low))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    cube = np.zeros((2, 3, 5))
    cube[1, 2, 3] = bad
    fine = np.zeros((2, 3, 5))
    for refuse in (
        lambda: bootstrap_means(cube[1]),
        lambda: bootstrap_ends(cube[1]),
        lambda: row_intervals(cube),
        lambda: seed_spreads(cube[1]),
        lambda: checkpoint_improvements(fine, cube),
        lambda: method_improvements(cube, fine),
    ):
        with pytest.raises(ValueError, match="not finite"):
            refuse()


def test_what_does_not_fit_is_refused() -> None:
    cube = np.zeros((2, 3, 5))
    for other in (np.zeros((2, 2, 5)), np.zeros((2, 3, 4)), np.zeros((1, 3, 5))):
        with pytest.raises(ValueError, match="not paired"):
            wins(cube, other)
    with pytest.raises(ValueError, match="expected \\[quantities, seeds, prompts\\]"):
        wins(cube[0], cube[0])
    with pytest.raises(ValueError, match="at least 3 seeds, got 2"):
        method_improvements(cube[:, :2], cube[:, :2])
    with pytest.raises(ValueError, match="at least 2 prompts, got 1"):
        checkpoint_improvements(cube[:, :, :1], cube[:, :, :1])
    with pytest.raises(ValueError, match="between 0 and 1"):
        Resampling(level=1.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        method_intervals(cube[0], level=95)
    with pytest.raises(ValueError, match="at least 1 resample"):
        checkpoint_intervals(cube[0], resamples=0)
    with pytest.raises(ValueError, match="percentile, bca"):
        checkpoint_intervals(cube[0], kind="BCa")  # type: ignore[arg-type]
