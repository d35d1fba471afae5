"""The reading of a table: its comparisons against scipy, and what its sentences say."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from cell_factory import TABLE1, make_cell, make_scores, make_table_cells

from benchmarks.evaluation.results import Cell
from benchmarks.evaluation.statistics import holm
from g2rpo.config import validate
from reproduce.report.grids import finding_grid
from reproduce.report.marks import Mark
from reproduce.tables.document import to_json
from reproduce.tables.findings import Finding, findings
from reproduce.tables.paper import load_paper_tables
from reproduce.tables.render import TableSpec
from reproduce.tables.summary import write_reading
from reproduce.tables.values import build_table

SPEC = validate(TableSpec, TABLE1, "table1")
CELLS = make_table_cells(SPEC)


def pick(found: tuple[Finding, ...], other: str, reward: str, group: str = "HPS") -> Finding:
    (one,) = (f for f in found if (f.group, f.other.key, f.column.reward) == (group, other, reward))
    return one


def seed_means(row: str, reward: str) -> list[float]:
    return [cell.means()[reward] for cell in CELLS if cell.info.row == row]


def test_every_pair_is_compared_once_in_every_column() -> None:
    found = findings(SPEC, CELLS, profile="mini")
    named = [(f.focus.key, f.other.key, f.column.reward) for f in found]
    others = ["dance_grpo", "mix_grpo", "flow_grpo", "g2rpo_no_mgai"]
    assert sorted(named) == sorted(
        (f"{group}/g2rpo", other, reward)
        for group in ("hps", "hps-clip")
        for other in ("base", *(f"{group}/{name}" for name in others))
        for reward in ("hps", "clip", "attributes")
    )


def test_methods_are_compared_by_the_paired_t_test() -> None:
    found = pick(findings(SPEC, CELLS, profile="mini"), "hps/dance_grpo", "clip")
    one, two = seed_means("hps/g2rpo", "clip"), seed_means("hps/dance_grpo", "clip")
    expected = scipy.stats.ttest_rel(one, two)
    assert found.comparison.label == "method"
    assert found.comparison.count == 3
    assert found.comparison.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.comparison.difference == pytest.approx(np.mean(one) - np.mean(two))


def test_the_base_is_a_constant() -> None:
    found = pick(findings(SPEC, CELLS, profile="mini"), "base", "hps")
    expected = scipy.stats.ttest_1samp(seed_means("hps/g2rpo", "hps"), seed_means("base", "hps")[0])
    assert found.comparison.p_value == pytest.approx(expected.pvalue, rel=1e-6)


def test_p_values_are_corrected_within_group_and_question() -> None:
    found = findings(SPEC, CELLS, profile="mini")
    for group in ("HPS", "HPS & CLIP"):
        for question, size in (("rows", 12), ("baseline", 3)):
            family = [f for f in found if (f.group, f.question) == (group, question)]
            assert len(family) == size
            corrected = holm([f.comparison.p_value for f in family])
            assert [f.adjusted for f in family] == pytest.approx(corrected.tolist())


def test_only_shared_seeds_are_paired() -> None:
    # The rows share seeds 1 and 2 only: too few for a claim about the methods.
    def cells(row: str, mean: float, seeds: tuple[int, ...]) -> list[Cell]:
        return [
            make_cell(row, seed=s, scores=make_scores({"hps": mean + s}, seed=s), train=("hps",))
            for s in seeds
        ]

    both = [*cells("hps/g2rpo", 0.4, (1, 2, 3)), *cells("hps/mix_grpo", 0.3, (0, 1, 2))]
    found = pick(findings(SPEC, both, profile="smoke"), "hps/mix_grpo", "hps")
    assert found.comparison.label == "checkpoint"
    assert found.comparison.count == 20
    # Pairing all of their own seeds would have given 1.1.
    assert found.comparison.difference == pytest.approx(0.1, abs=0.01)
    assert "say nothing about training the method again" in write_reading(
        SPEC, both, profile="smoke"
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "probability"),
    [
        # Prompt by prompt: won and lost; tied and lost. The means over seeds win and lose: 1/2.
        ({1: (9, 1), 2: (0, 1)}, {1: (0, 2), 2: (0, 2)}, (1 + 0 + 0.5 + 0) / 4),
        # Seed 2 alone is shared: lost, won.
        ({1: (9, 9), 2: (1, 3)}, {2: (2, 2), 3: (0, 0)}, 1 / 2),
        # None is shared: each of two trainings meets each of three.
        ({1: (1, 5), 2: (3, 5)}, {3: (0, 9), 4: (2, 9), 5: (3, 5)}, (4.5 - 1 + 0 + 1) / 12),
        ({1: (1, 5)}, {2: (0, 6)}, 1 / 2),
        # Three seeds are about the method, and mean the same.
        ({1: (9, 1), 2: (0, 1), 3: (1, 1)}, dict.fromkeys((1, 2, 3), (0.5, 1)), 3.5 / 6),
    ],
)
def test_wins_are_counted_training_by_training(
    ours: dict[int, tuple[float, ...]], theirs: dict[int, tuple[float, ...]], probability: float
) -> None:
    cells = [
        make_cell(row, seed=seed, scores=scored(values), train=("hps",))
        for row, seeds in (("hps/g2rpo", ours), ("hps/mix_grpo", theirs))
        for seed, values in seeds.items()
    ]
    found = pick(findings(SPEC, cells, profile="smoke"), "hps/mix_grpo", "hps")
    assert found.improvement.mean == pytest.approx(probability)
    table = build_table(SPEC, cells, profile="smoke", paper=load_paper_tables())
    (written,) = (c for c in json.loads(to_json(table, cells))["comparisons"])
    assert written["improvement"]["mean"] == pytest.approx(probability, abs=1e-6)
    assert f"with probability {probability:.3f}" in write_reading(SPEC, cells, profile="smoke")


def scored(values: Sequence[float]) -> pd.DataFrame:
    prompts = [f"p{index}" for index in range(len(values))]
    return pd.DataFrame({"prompt_id": prompts, "reward": "hps", "score": values})


@pytest.mark.parametrize("p_value", [0.0494, 0.0496, 0.0499999975, 0.0501, 0.0504])
def test_p_and_its_mark_agree_in_every_form(p_value: float) -> None:
    # Differences -s + m, m, s + m: with two degrees of freedom p = 1 - t / sqrt(t² + 2).
    t = (1 - p_value) * np.sqrt(2 / (1 - (1 - p_value) ** 2))
    cells = [
        make_cell(row, seed=seed, scores=scored((mean, mean)), train=("hps",))
        for seed in (0, 1, 2)
        for row, mean in (("hps/mix_grpo", 0.0), ("hps/g2rpo", t / np.sqrt(3) + seed - 1))
    ]
    found = findings(SPEC, cells, profile="smoke")
    (finding,) = found
    assert finding.comparison.p_value == pytest.approx(p_value, abs=1e-8)
    significant = finding.comparison.p_value < 0.05
    assert significant == (p_value < 0.05)
    assert (finding.verdict == "above") == significant

    def agrees(text: str) -> bool:
        return ("< 0.05" in text or "0.049" in text) == significant

    (row,) = (
        line for line in write_reading(SPEC, cells, profile="smoke").splitlines()
        if line.startswith("| G")
    )  # fmt: skip
    assert agrees(row) and agrees(finding.sentences)
    grid = finding_grid(SPEC, found)
    assert grid is not None and agrees(grid.rows[0][5].text)
    table = build_table(SPEC, cells, profile="smoke", paper=load_paper_tables())
    (written,) = json.loads(to_json(table, cells))["comparisons"]
    assert (written["p_holm"] < 0.05) == significant
    mark = Mark(finding.comparison, finding.adjusted, "MixGRPO", 3)
    assert (mark.symbol == "▲") == significant and agrees(mark.sentence)


@pytest.mark.parametrize(
    ("sign", "spread", "verdict", "paper_verdict"),
    [
        (1, 1e-5, "above", "confirmed"),
        (-1, 1e-5, "below", "contradicted"),
        (1, 10.0, "not settled", "same direction"),
        (-1, 10.0, "not settled", "opposite direction"),
    ],
)
def test_verdicts(sign: int, spread: float, verdict: str, paper_verdict: str) -> None:
    # The paper has G2RPO above MixGRPO by 0.007 on HPS.
    cells = []
    for seed, deviation in enumerate((-spread, 0.0, spread)):
        for row, mean in (("hps/mix_grpo", 0.3), ("hps/g2rpo", 0.3 + sign * 0.1 + deviation)):
            scores = make_scores({"hps": mean}, seed=7)
            cells.append(make_cell(row, seed=seed, scores=scores, train=("hps",)))
    found = pick(findings(SPEC, cells, profile="smoke"), "hps/mix_grpo", "hps")
    assert (found.verdict, found.paper_verdict) == (verdict, paper_verdict)
    assert found.published == 0.007


def test_what_only_the_single_comparison_finds_is_named_so() -> None:
    finding = pick(findings(SPEC, CELLS, profile="mini"), "hps/dance_grpo", "hps")
    values: dict[str, Any] = {**finding.__dict__, "adjusted": 0.2}
    assert finding.comparison.p_value < 0.05
    assert Finding(**values).verdict == "above before correction only"


def test_the_reading_says_what_was_found() -> None:
    text = write_reading(SPEC, CELLS, profile="mini", heading="Equal iterations")
    assert text.startswith("### Equal iterations: what holds (profile `mini`)")
    found = findings(SPEC, CELLS, profile="mini")
    rows = [line for line in text.splitlines() if line.startswith("| G²RPO |")]
    assert len(rows) == len(found)
    for line, finding in zip(rows, found, strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[1] == finding.other.label
        assert float(cells[3]) == pytest.approx(finding.comparison.difference, abs=5.1e-4)
        assert cells[8] == finding.verdict
        assert f"- {finding.focus.group}: {finding.sentences}".replace("<", "\\<") in text
        assert f"over {finding.family} comparisons" in finding.sentences
        assert 0 <= finding.improvement.mean <= 1
    assert "3 shared training seeds" in text
    assert "2 degrees of freedom" in text
    # Made with the same costs for every method.
    assert "rollout evaluations 1.00×" in text
    known = [f for f in found if f.paper_verdict]
    counts = re.search(
        r"Of the (\d+) differences .*?, (\d+) are confirmed .*?, (\d+) point the same way .*?, "
        r"(\d+) point the other way .*? and (\d+) are contradicted",
        text,
    )
    assert counts is not None
    total, *parts = (int(number) for number in counts.groups())
    assert total == len(known) == sum(parts)
    # Later rows were made better: G2RPO against MixGRPO on CLIP is against the paper's -0.003.
    assert "G²RPO against MixGRPO (HPS), CLIP: here +0.0" in text


def test_a_table_without_results_has_nothing_to_read() -> None:
    assert "Nothing to compare yet" in write_reading(SPEC, [], profile="mini")
