"""The agreement of two profiles about the order of methods, against SciPy and plain loops."""

import itertools
import operator
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
from command_line import g2rpo_here
from golden import cells_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks.evaluation.results import Cell
from benchmarks.evaluation.statistics import holm
from reproduce.experiment import ROOT, Profile, load_experiment, load_profile
from reproduce.tables.agreement import agreements, rank_correlation, repeated_correlation

SEEDS = (1, 2, 3)
METHODS = ("dance_grpo", "mix_grpo", "flow_grpo", "g2rpo_no_mgai", "g2rpo")
PROFILES = ("mini", "mini-sd3")


def hps_means(profile: str, seeds: Sequence[int]) -> np.ndarray:
    """The committed HPS means, [methods, seeds]."""
    cells = {(one.info.row, one.info.seed): one for one in cells_of(f"{profile}/table1")}
    values = [[cells[f"hps/{m}", seed].means()["hps"] for seed in seeds] for m in METHODS]
    return np.array(values)


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    return float(scipy.stats.kendalltau(first, second).statistic)


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_without_ties_tau_is_kendalls(first: list[int], second: list[int]) -> None:
    found = rank_correlation(np.array(first, float), np.array(second, float))
    assert found == pytest.approx(kendall(first, second))


def test_a_tie_counts_for_neither_order() -> None:
    assert rank_correlation(np.array([1.0, 1, 2]), np.array([1.0, 2, 3])) == pytest.approx(2 / 3)


@given(arrays(float, (3, 5), elements=st.integers(0, 9)))
def test_repeated_correlation_is_over_every_split_of_the_seeds(values: np.ndarray) -> None:
    taus = []
    for order in itertools.permutations(range(5), 4):
        one, other = values[:, order[:2]].mean(axis=1), values[:, order[2:]].mean(axis=1)
        pairs = [(0, 1), (0, 2), (1, 2)]
        taus.append(
            np.mean([np.sign(one[i] - one[j]) * np.sign(other[i] - other[j]) for i, j in pairs])
        )
    assert repeated_correlation(values, 2) == pytest.approx(np.mean(taus))
    assert repeated_correlation(values, 3) is None


@pytest.fixture(scope="module")
def sides() -> list[tuple[Profile, list[Cell]]]:
    return [(load_profile(name), cells_of(f"{name}/table1")) for name in PROFILES]


def test_in_domain_agreement_is_that_of_the_training_reward(
    sides: list[tuple[Profile, list[Cell]]],
) -> None:
    found = agreements(load_experiment("table1"), sides[0], sides[1], SEEDS)
    assert [(one.measure, one.group) for one in found] == [
        ("in_domain", "HPS"),
        ("out_of_domain", "HPS"),
    ]
    one = found[0]
    values = [hps_means(name, SEEDS) for name in PROFILES]
    assert one.tau == pytest.approx(kendall(*(side.mean(axis=1) for side in values)))
    pairs = list(itertools.combinations(range(len(METHODS)), 2))
    orders = [[side[i].mean() > side[j].mean() for i, j in pairs] for side in values]
    assert (one.same, one.pairs) == (sum(map(operator.eq, *orders)), len(pairs))
    significant = [
        holm([scipy.stats.ttest_rel(side[i], side[j]).pvalue for i, j in pairs]) < 0.05
        for side in values
    ]
    both = significant[0] & significant[1]
    assert one.significant == both.sum()
    assert one.contradicted == (both & (np.array(orders[0]) != np.array(orders[1]))).sum()


def test_the_interval_is_over_resampled_seeds_of_both(
    sides: list[tuple[Profile, list[Cell]]],
) -> None:
    one = agreements(load_experiment("table1"), sides[0], sides[1], SEEDS)[0]
    resampled = [
        [hps_means(name, drawn).mean(axis=1) for drawn in itertools.product(SEEDS, repeat=3)]
        for name in PROFILES
    ]
    taus = [kendall(first, second) for first in resampled[0] for second in resampled[1]]
    assert [one.low, one.high] == pytest.approx(np.quantile(taus, [0.025, 0.975]))


def test_the_repeated_order_is_of_other_seeds_of_the_first(
    sides: list[tuple[Profile, list[Cell]]],
) -> None:
    one = agreements(load_experiment("table1"), sides[0], sides[1], SEEDS)[0]
    every = hps_means("mini", range(1, 9))
    taus = [
        kendall(every[:, list(first)].mean(axis=1), every[:, list(second)].mean(axis=1))
        for first in itertools.combinations(range(8), 3)
        for second in itertools.combinations(sorted(set(range(8)) - set(first)), 3)
    ]
    assert one.repeated == pytest.approx(np.mean(taus))


def test_a_profile_agrees_with_itself(sides: list[tuple[Profile, list[Cell]]]) -> None:
    profile, cells = sides[0]
    other = profile.model_copy(update={"name": "other"})
    for one in agreements(load_experiment("table1"), (profile, cells), (other, cells)):
        assert (one.tau, one.same, one.contradicted) == (1, one.pairs, 0)
        assert one.repeated is None  # it has no eight other seeds


def test_the_command_prints_what_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["agreement", "table1", "--profiles", "mini,mini-sd3", "--seeds", "1,2,3"]
    assert g2rpo_here(ROOT, *arguments, "--publish") == 0
    shown = capsys.readouterr().out
    assert "in-domain, trained on HPS" in shown
    assert "7 of 10 pairs have the same order: Kendall's tau 0.40" in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--profiles", "mini"], "give two or more, each once"),
        (["--profiles", "mini,mini"], "give two or more, each once"),
        (["--profiles", "mini,sd35"], "no finished cells; run `g2rpo reproduce table1"),
        (["--profiles", "mini,mini-sd3", "--seeds", "1,2"], "share 2 of the seeds"),
        (["--profiles", "mini,mini-sd3", "--seeds", "x"], "--seeds 'x'"),
        (["--profiles", "mini,nimi"], "nimi"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert g2rpo_here(ROOT, "agreement", "table1", *arguments, "--publish") == 2
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert len(error.splitlines()) == 1
