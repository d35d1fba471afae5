"""A table's comparisons against scipy, and what its summary says of them."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from cell_factory import TABLE1, make_cell, make_scores, make_table_cells

from benchmarks.evaluation.results import Cell, Protocol
from benchmarks.evaluation.statistics import holm
from g2rpo.config import validate
from reproduce.experiment.table import TableSpec
from reproduce.tables.formats import to_json
from reproduce.tables.model import RowComparison, Table
from reproduce.tables.summary import pair_sentence, summary_markdown
from reproduce.tables.table import compute_table

SPEC = validate(TableSpec, TABLE1, "table1")
CELLS = make_table_cells(SPEC)


@pytest.fixture(scope="module")
def table() -> Table:
    return compute_table(SPEC, CELLS, "mini")


def pick(table: Table, other: str, reward: str) -> RowComparison:
    (one,) = (
        c
        for c in table.comparisons
        if (c.first, c.second, c.reward) == ("hps/g2rpo", other, reward)
    )
    return one


def seed_means(row: str, reward: str) -> list[float]:
    return [cell.means()[reward] for cell in CELLS if cell.info.row == row]


def test_every_pair_is_compared_once_in_every_column(table: Table) -> None:
    others = ["dance_grpo", "mix_grpo", "flow_grpo", "g2rpo_no_mgai"]
    assert sorted((c.first, c.second, c.reward) for c in table.comparisons) == sorted(
        (f"{group}/g2rpo", other, reward)
        for group in ("hps", "hps-clip")
        for other in ("base", *(f"{group}/{name}" for name in others))
        for reward in ("hps", "clip", "attributes")
    )


def test_methods_are_compared_by_the_paired_t_test(table: Table) -> None:
    found = pick(table, "hps/dance_grpo", "clip")
    one, two = seed_means("hps/g2rpo", "clip"), seed_means("hps/dance_grpo", "clip")
    assert (found.about, found.count) == ("method", 3)
    assert found.p_value == pytest.approx(scipy.stats.ttest_rel(one, two).pvalue, rel=1e-6)
    assert found.difference == pytest.approx(np.mean(one) - np.mean(two))


def test_p_values_are_corrected_within_group_and_question(table: Table) -> None:
    for focus in ("hps/g2rpo", "hps-clip/g2rpo"):
        for question, size in (("rows", 12), ("baseline", 3)):
            family = [c for c in table.comparisons if (c.first, c.question) == (focus, question)]
            assert [c.family for c in family] == [size] * size
            corrected = holm([c.p_value for c in family])
            assert [c.p_holm for c in family] == pytest.approx(corrected.tolist())


def test_marks_are_the_comparisons_with_the_baseline(table: Table) -> None:
    row = table.row("hps/g2rpo")
    compared = [pick(table, "base", reward) for reward in row.scores]
    marks = [score.mark for score in row.scores.values()]
    corrected = holm([c.p_value for c in compared])
    for mark, one, p_value in zip(marks, compared, corrected, strict=True):
        assert mark is not None
        assert mark.second == "base"
        assert (mark.difference, mark.p_value) == (one.difference, one.p_value)
        assert mark.p_holm == pytest.approx(p_value)
    assert all(score.mark is None for score in table.row("base").scores.values())


def test_without_a_baseline_marks_are_against_the_focus_row(table: Table) -> None:
    alone = compute_table(SPEC.model_copy(update={"baseline": None}), CELLS, "mini")
    mark = alone.row("hps/mix_grpo").scores["clip"].mark
    found = pick(table, "hps/mix_grpo", "clip")
    assert mark is not None
    assert (mark.difference, mark.low, mark.high) == pytest.approx(
        (-found.difference, -found.high, -found.low)
    )


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_a_baseline_evaluated_differently_is_not_compared(seeds: tuple[int, ...]) -> None:
    base = make_cell("base", seed=None, scores=make_scores({"hps": 0.2}, prompts=20))
    protocol = Protocol(name="short", hash="x")
    rows = [
        make_cell(
            row, seed=seed, train=("hps",), protocol=protocol,
            scores=make_scores({"hps": mean}, seed=seed, prompts=8),
        )
        for row, mean in (("hps/g2rpo", 0.9), ("hps/mix_grpo", 0.8))
        for seed in seeds
    ]  # fmt: skip
    table = compute_table(SPEC, [base, *rows], "mini")
    compared = {(one.first, one.second) for one in table.comparisons}
    assert compared == {("hps/g2rpo", "hps/mix_grpo")}
    (note,) = (note for note in table.notes if note.startswith("Not compared with Base"))
    assert "MixGRPO" in note and "G²RPO" in note


def scored(values: Sequence[float]) -> pd.DataFrame:
    prompts = [f"p{index}" for index in range(len(values))]
    return pd.DataFrame({"prompt_id": prompts, "reward": "hps", "score": values})


def two_rows(
    ours: dict[int, pd.DataFrame], theirs: dict[int, pd.DataFrame]
) -> tuple[Table, RowComparison]:
    """G²RPO against MixGRPO, each with scores by seed."""
    cells: list[Cell] = [
        make_cell(row, seed=seed, scores=scores, train=("hps",))
        for row, seeds in (("hps/g2rpo", ours), ("hps/mix_grpo", theirs))
        for seed, scores in seeds.items()
    ]
    table = compute_table(SPEC, cells, "smoke")
    return table, pick(table, "hps/mix_grpo", "hps")


def test_only_shared_seeds_are_paired() -> None:
    # The rows share seeds 1 and 2 only: too few for a claim about the methods.
    ours, theirs = (
        {seed: make_scores({"hps": mean + seed}, seed=seed) for seed in seeds}
        for mean, seeds in ((0.4, (1, 2, 3)), (0.3, (0, 1, 2)))
    )
    table, found = two_rows(ours, theirs)
    assert (found.about, found.count) == ("checkpoint", 20)
    # Pairing all of their own seeds would have given 1.1.
    assert found.difference == pytest.approx(0.1, abs=0.01)
    assert "say nothing about retraining the method" in summary_markdown(table)


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
    one, two = ({s: scored(values) for s, values in side.items()} for side in (ours, theirs))
    table, found = two_rows(one, two)
    assert found.improvement.mean == pytest.approx(probability)
    assert rf"| {probability:.3f} \[" in summary_markdown(table)


@pytest.mark.parametrize("p_value", [0.0494, 0.0496, 0.0499999975, 0.0501, 0.0504])
def test_p_and_its_mark_agree_in_every_form(p_value: float) -> None:
    # Differences -s + m, m, s + m: with two degrees of freedom p = 1 - t / sqrt(t² + 2).
    t = (1 - p_value) * np.sqrt(2 / (1 - (1 - p_value) ** 2))
    ours = {s: scored((t / np.sqrt(3) + s - 1,) * 2) for s in (0, 1, 2)}
    table, found = two_rows(ours, {seed: scored((0.0, 0.0)) for seed in (0, 1, 2)})
    assert found.p_value == pytest.approx(p_value, abs=1e-8)
    significant = found.p_value < 0.05
    assert found.significant == significant == (p_value < 0.05)
    assert (found.verdict == "higher") == significant
    lines = summary_markdown(table).splitlines()
    (shown,) = (line for line in lines if line.startswith("| G"))
    assert ("< 0.05" in shown or "0.049" in shown) == significant
    (written,) = re.findall(r'"p_holm": ([\d.]+)', to_json(table))
    assert (float(written) < 0.05) == significant


@pytest.mark.parametrize(
    ("sign", "spread", "verdict", "paper_verdict"),
    [
        (1, 1e-5, "higher", "confirmed"),
        (-1, 1e-5, "lower", "contradicted"),
        (1, 10.0, "not significant", "same direction"),
        (-1, 10.0, "not significant", "opposite direction"),
    ],
)
def test_verdicts(sign: int, spread: float, verdict: str, paper_verdict: str) -> None:
    # The paper has G2RPO above MixGRPO by 0.007 on HPS.
    deviations = dict(enumerate((-spread, 0.0, spread)))
    ours = {s: make_scores({"hps": 0.3 + sign * 0.1 + d}, seed=7) for s, d in deviations.items()}
    theirs = {seed: make_scores({"hps": 0.3}, seed=7) for seed in deviations}
    _, found = two_rows(ours, theirs)
    assert (found.verdict, found.paper_verdict) == (verdict, paper_verdict)
    assert found.published_difference == 0.007


def test_what_only_the_single_comparison_finds_is_named_so() -> None:
    # t of p = 0.03 in one of two columns: 0.06 after the correction.
    t = 0.97 * np.sqrt(2 / (1 - 0.97**2))
    frames = [
        pd.concat(
            [
                make_scores({"hps": t / np.sqrt(3) + seed - 1}, spread=0, seed=1),
                make_scores({"clip": [9.0, -9.0, 1.0][seed]}, spread=0, seed=1),
            ]
        )
        for seed in (0, 1, 2)
    ]
    base = {seed: make_scores({"hps": 0.0, "clip": 0.0}, spread=0, seed=1) for seed in (0, 1, 2)}
    table, found = two_rows(dict(enumerate(frames)), base)
    assert found.verdict == "higher before correction only"
    assert "| 0.030 | 0.060 |" in summary_markdown(table)
    assert pair_sentence(table, table.comparisons) == (
        "G²RPO vs. MixGRPO (method): higher before correction only on HPS; not significant on CLIP."
    )


def test_the_summary_says_what_was_found(table: Table) -> None:
    text = summary_markdown(table)
    assert text.startswith("### Table 1: held-out scores: summary (profile `mini`)")
    rows = [line for line in text.splitlines() if line.startswith("| G²RPO |")]
    for line, found in zip(rows, table.comparisons, strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[1] == table.row(found.second).label
        assert float(cells[3]) == pytest.approx(found.difference, abs=5.1e-4)
        assert cells[9] == found.verdict
        assert 0 <= found.improvement.mean <= 1
    assert "3 shared training seeds" in text
    assert "2 degrees of freedom" in text
    # Made with the same costs for every method.
    assert "rollout evaluations 1.00×" in text
    known = [c for c in table.comparisons if c.paper_verdict]
    counts = re.search(
        r"The paper reports (\d+) of .*?: (\d+) are confirmed .*?, (\d+) have the same direction, "
        r"(\d+) have the opposite direction and (\d+) are contradicted",
        text,
    )
    assert counts is not None
    total, *parts = (int(number) for number in counts.groups())
    assert total == len(known) == sum(parts)
    # Later rows were made better: G2RPO against MixGRPO on CLIP is against the paper's -0.003.
    assert "G²RPO vs. MixGRPO (HPS), CLIP: here +0.0" in text


def test_a_difference_on_every_prompt_leaves_room_in_the_probability() -> None:
    low, high = (dict.fromkeys((1, 2), make_scores({"hps": mean}, seed=3)) for mean in (0.3, 0.4))
    table, found = two_rows(low, high)
    assert found.verdict == "lower"
    (line,) = (line for line in summary_markdown(table).splitlines() if line.startswith("| G²RPO"))
    assert r"| -0.100 | -0.100 to -0.100 | \< 0.001 | \< 0.001 | 0.000 \[0.000, 0.168\] |" in line


def test_a_table_without_results_has_nothing_to_compare() -> None:
    assert "Nothing to compare yet" in summary_markdown(compute_table(SPEC, [], "mini"))
