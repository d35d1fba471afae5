"""The detectable difference against an integral, a simulation and a published sample size."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from command_line import g2rpo_here
from scipy.integrate import quad

from benchmarks.evaluation.power import detectable_difference, interval_deviation, t_test_power
from benchmarks.evaluation.statistics import method_intervals


def integrated_power(noncentrality: float, count: int, alpha: float) -> float:
    """The statistic is normal given the sample's deviation, whose square is chi-squared."""
    freedom = count - 1
    critical = scipy.stats.t.isf(alpha / 2, freedom)

    def rejected(deviation: float) -> float:
        edges = np.array([-critical, critical]) * deviation - noncentrality
        below, above = scipy.stats.norm.cdf(edges[0]), scipy.stats.norm.sf(edges[1])
        return float((below + above) * density.pdf(deviation))

    density = scipy.stats.chi(freedom, scale=freedom**-0.5)
    return float(quad(rejected, 0, density.isf(1e-14), limit=200)[0])


@pytest.mark.parametrize("count", [3, 5, 20])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 8])
@pytest.mark.parametrize("noncentrality", [0.0, 1.0, 4.0, 30.0])
def test_the_power_is_the_integral_over_the_deviation(
    noncentrality: float, count: int, alpha: float
) -> None:
    expected = integrated_power(noncentrality, count, alpha)
    assert t_test_power(noncentrality, count, alpha) == pytest.approx(expected, abs=1e-6)


def test_34_pairs_find_half_a_standard_deviation() -> None:
    # Cohen's medium effect in a paired t-test, as in G*Power's manual.
    assert detectable_difference(1.0, 34) < 0.5 < detectable_difference(1.0, 33)


@pytest.mark.parametrize(("seeds", "comparisons"), [(3, 1), (5, 8)])
def test_the_detectable_difference_is_found_four_times_in_five(
    seeds: int, comparisons: int
) -> None:
    true = detectable_difference(2.0, seeds, comparisons=comparisons)
    samples = np.random.default_rng(1).normal(true, 2.0, (40_000, seeds))
    p_values = scipy.stats.ttest_1samp(samples, 0.0, axis=1).pvalue
    assert np.mean(p_values < 0.05 / comparisons) == pytest.approx(0.8, abs=0.008)


def test_the_deviation_follows_from_the_interval() -> None:
    values = np.array([0.1, 0.4, 0.35, 0.2])
    (interval,) = method_intervals(values[None])
    assert interval_deviation(interval.low, interval.high, 4) == pytest.approx(values.std(ddof=1))


def test_no_deviation_hides_no_difference() -> None:
    assert detectable_difference(0.0, 3) == 0.0


@pytest.mark.parametrize(
    "arguments", [("nan",), ("1", "--seeds", "2"), ("1", "--comparisons", "0"), ("--", "-1")]
)
def test_the_command_refuses_what_has_no_answer(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert g2rpo_here(tmp_path, "power", *arguments) == 2
    assert "needs at least 3 seeds" in capsys.readouterr().err


def test_the_command_prints_a_line_for_each_number_of_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert g2rpo_here(tmp_path, "power", "0.5", "--seeds", "3,34") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Smallest difference found with probability 0.8:"
    assert [line.split() for line in lines[2:]] == [
        ["3", f"{detectable_difference(0.5, 3):.3g}"],
        ["34", f"{detectable_difference(0.5, 34):.3g}"],
    ]
