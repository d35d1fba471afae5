"""Shares of the headroom and the comparisons declared before a run, against plain loops."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from cell_factory import REWARDS, TABLE1, csv_rows, make_cell, make_scores, make_table_cells, render
from rich.console import Console

from benchmarks.evaluation.power import detectable_difference
from benchmarks.evaluation.results import Cell, Provenance
from benchmarks.evaluation.statistics import holm
from g2rpo.config import validate
from g2rpo.files import sha256_file
from reproduce.experiment.table import TableSpec
from reproduce.report.table_grids import block_grid
from reproduce.tables.blocks import blocks
from reproduce.tables.model import RowComparison, Table
from reproduce.tables.table import compute_table
from reproduce.tables.terminal import print_table

PROMPTS = 20
METHODS = ("g2rpo", "dance_grpo", "mix_grpo", "flow_grpo", "g2rpo_no_mgai")
WEIGHTS = {reward: f"weights of {reward}" for reward in REWARDS}
TRUTH = {"hps": 0.9, "clip": 0.7, "attributes": 1.3}
SPEC = validate(
    TableSpec,
    TABLE1
    | {
        "primary": {
            f"{group}/g2rpo": [f"{group}/{method}" for method in METHODS[1:]]
            for group in ("hps", "hps-clip")
        }
    },
    "table1",
)


def weighted(cells: list[Cell]) -> list[Cell]:
    known = Provenance(packages={}, weights=WEIGHTS, hardware={})
    return [Cell(cell.info.model_copy(update={"provenance": known}), cell.scores) for cell in cells]


CELLS = weighted(make_table_cells(SPEC))


@pytest.fixture
def truth(tmp_path: Path) -> dict[str, Any]:
    """A truth with the scores of :data:`TRUTH`, and what a table says of it."""
    captions = tmp_path / "test.csv"
    # The captions are in another order than the sorted ids of the scores.
    rows = [f"p{index:03d},a shape\n" for index in reversed(range(PROMPTS))]
    captions.write_text("".join(["id,prompt\n", *rows]))
    rewards = {
        reward: {
            "weights": WEIGHTS[reward],
            "mean": mean,
            "scores": [mean + 0.01 * (index - (PROMPTS - 1) / 2) for index in range(PROMPTS)],
        }
        for reward, mean in TRUTH.items()
    }
    file = tmp_path / "truth.json"
    split = {"captions": sha256_file(captions), "rewards": rewards}
    file.write_text(json.dumps({"test": split}))
    return {"file": str(file), "split": "test", "captions": str(captions)}


def spec_of(truth: dict[str, Any], **changes: Any) -> TableSpec:
    data = SPEC.model_dump() | {"truth": truth} | changes
    return validate(TableSpec, data, "table1")


@pytest.fixture
def table(truth: dict[str, Any]) -> Table:
    return compute_table(spec_of(truth), CELLS, "mini")


def shares(row: str, rewards: tuple[str, ...]) -> list[float]:
    """The mean share of headroom of each seed."""
    base = next(cell for cell in CELLS if cell.info.row == "base").means()
    return [
        sum((cell.means()[r] - base[r]) / (TRUTH[r] - base[r]) for r in rewards) / len(rewards)
        for cell in CELLS
        if cell.info.row == row
    ]


@pytest.mark.parametrize(
    ("row", "inside", "outside"),
    [
        ("hps/mix_grpo", ("hps",), ("clip", "attributes")),
        ("hps-clip/g2rpo", ("hps", "clip"), ("attributes",)),
    ],
)
def test_a_share_lies_between_base_and_truth(
    table: Table, row: str, inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    found = table.row(row).headroom
    measures = (("in_domain", inside), ("out_of_domain", outside))
    for name, rewards in (*measures, *((reward, (reward,)) for reward in TRUTH)):
        seeds = shares(row, rewards)
        assert found[name].mean == pytest.approx(np.mean(seeds), abs=1e-6)
        interval = scipy.stats.t.interval(0.95, 2, np.mean(seeds), scipy.stats.sem(seeds))
        assert (found[name].low, found[name].high) == pytest.approx(interval, abs=1e-6)
        assert (found[name].about, found[name].count) == ("method", 3)
    assert table.row("base").headroom == {}


def test_the_truth_scores_one_and_the_base_nothing(truth: dict[str, Any]) -> None:
    cells = [cell for cell in CELLS if cell.info.row == "base"]
    for key, means in (("hps/g2rpo", TRUTH), ("hps/mix_grpo", cells[0].means())):
        scores = make_scores(means)
        scores["score"] += scores["reward"].map(means) - scores.groupby("reward")[
            "score"
        ].transform("mean")
        cells += weighted([make_cell(key, seed=1, scores=scores, train=("hps",))])
    table = compute_table(spec_of(truth), cells, "mini")
    for key, share in (("hps/g2rpo", 1.0), ("hps/mix_grpo", 0.0)):
        found = table.row(key).headroom
        assert [found["in_domain"].mean, found["out_of_domain"].mean] == pytest.approx(
            [share, share], abs=1e-6
        )
        assert found["in_domain"].about == "checkpoint"


def planned(table: Table, question: str, group: str) -> list[RowComparison]:
    return [c for c in table.comparisons if c.question == question and c.first.startswith(group)]


def test_primary_comparisons_are_a_family_of_their_own(table: Table) -> None:
    found = planned(table, "primary", "hps/")
    assert [(c.second, c.reward) for c in found] == [
        (f"hps/{method}", measure)
        for method in METHODS[1:]
        for measure in ("in_domain", "out_of_domain")
    ]
    for one in found:
        rewards = ("hps",) if one.reward == "in_domain" else ("clip", "attributes")
        ours, theirs = shares("hps/g2rpo", rewards), shares(one.second, rewards)
        assert one.difference == pytest.approx(np.mean(ours) - np.mean(theirs), abs=1e-6)
        expected = scipy.stats.ttest_rel(ours, theirs).pvalue
        assert one.p_value == pytest.approx(expected, rel=1e-3)
        spread = np.std(np.subtract(ours, theirs), ddof=1)
        assert one.detectable == pytest.approx(
            detectable_difference(float(spread), 3, comparisons=8), rel=1e-3
        )
    assert [c.family for c in found] == [8] * 8
    assert [c.p_holm for c in found] == pytest.approx(holm([c.p_value for c in found]).tolist())
    # In one reward the scale changes no p-value.
    secondary = {
        c.second: c for c in table.comparisons if (c.first, c.reward) == ("hps/g2rpo", "hps")
    }
    for one in found[::2]:
        assert one.p_value == pytest.approx(secondary[one.second].p_value, rel=1e-3)


def test_the_order_of_five_methods_has_ten_comparisons(table: Table) -> None:
    found = planned(table, "order", "hps/")
    pairs = list(itertools.combinations([f"hps/{method}" for method in METHODS], 2))
    assert [(c.first, c.second) for c in found] == pairs
    assert {c.reward for c in found} == {"in_domain"}
    assert [c.p_holm for c in found] == pytest.approx(holm([c.p_value for c in found]).tolist())
    significant = sum(c.p_holm < 0.05 for c in found)
    (note,) = (note for note in table.notes if note.startswith("Orders (HPS):"))
    assert f": {significant} of 10 differences in in-domain headroom are significant" in note


@pytest.mark.parametrize(("distance", "equivalent"), [(0.005, True), (0.019, False), (0.05, False)])
def test_equivalence_needs_the_whole_interval(
    truth: dict[str, Any], distance: float, equivalent: bool
) -> None:
    base = next(cell for cell in CELLS if cell.info.row == "base")
    room = TRUTH["hps"] - base.means()["hps"]
    cells = [base]
    for key, shift in (("hps/g2rpo", distance * room), ("hps/mix_grpo", 0.0)):
        for seed, wobble in enumerate((-0.001, 0.0, 0.001)):
            scores = make_scores(dict.fromkeys(REWARDS, 0.5), seed=1)
            scores["score"] += shift + (wobble * room if shift else 0.0)
            cells += weighted([make_cell(key, seed=seed, scores=scores, train=("hps",))])
    (one,) = planned(compute_table(spec_of(truth), cells, "mini"), "order", "hps/")
    # Student's t with two degrees of freedom: 4.303 * 0.001 / sqrt(3) = 0.0025.
    assert (one.low, one.high) == pytest.approx((distance - 0.0025, distance + 0.0025), abs=1e-4)
    assert one.equivalent is equivalent


def test_two_rows_of_a_group_share_one_family(truth: dict[str, Any]) -> None:
    others = ["hps/mix_grpo", "hps/flow_grpo"]
    primary = {"hps/g2rpo": others, "hps/g2rpo_no_mgai": others}
    table = compute_table(spec_of(truth, primary=primary), CELLS, "mini")
    found = planned(table, "primary", "hps/")
    assert [c.family for c in found] == [8] * 8
    assert [c.p_holm for c in found] == pytest.approx(holm([c.p_value for c in found]).tolist())
    pairs = [frozenset((c.first, c.second)) for c in planned(table, "order", "hps/")]
    assert len(pairs) == len(set(pairs)) == 6  # of four rows


def test_without_a_truth_the_unit_is_the_bases_deviation() -> None:
    table = compute_table(SPEC, CELLS, "mini")
    base = next(cell for cell in CELLS if cell.info.row == "base").scores
    deviation = base[base["reward"] == "hps"]["score"].std(ddof=1)
    one = planned(table, "primary", "hps/")[0]
    raw = next(c for c in table.comparisons if (c.question, c.reward) == ("rows", "hps"))
    assert one.difference == pytest.approx(raw.difference / deviation, rel=1e-4)
    assert one.equivalent is None
    assert all(row.headroom == {} for row in table.rows)


def test_one_seed_says_nothing_about_other_seeds(truth: dict[str, Any]) -> None:
    cells = weighted(make_table_cells(SPEC, seeds=1))
    found = planned(compute_table(spec_of(truth), cells, "mini"), "primary", "hps/")
    assert {(c.about, c.detectable) for c in found} == {("checkpoint", None)}


def test_missing_rows_shrink_the_family(truth: dict[str, Any]) -> None:
    cells = [cell for cell in CELLS if cell.info.row != "hps/mix_grpo"]
    table = compute_table(spec_of(truth), cells, "mini")
    assert len(planned(table, "primary", "hps/")) == 6
    assert len(planned(table, "order", "hps/")) == 6


def changed(document: dict[str, Any], change: str) -> None:
    split = document["test"]
    if change == "captions":
        split["captions"] = "0" * 64
    elif change == "weights":
        split["rewards"]["clip"]["weights"] = "others"
    elif change == "reward":
        del split["rewards"]["attributes"]
    else:
        split["rewards"]["hps"]["scores"] = [0.0] * PROMPTS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("captions", "truth.json was measured on other captions than test.csv"),
        ("weights", "truth.json was measured with other weights of CLIP"),
        ("reward", "truth.json lacks the split test or one of the rewards"),
        ("level", "the truth scores no higher than the base under HPS"),
    ],
)
def test_a_truth_of_something_else_is_named_and_left_out(
    truth: dict[str, Any], change: str, reason: str
) -> None:
    path = Path(truth["file"])
    document = json.loads(path.read_text())
    changed(document, change)
    path.write_text(json.dumps(document))
    table = compute_table(spec_of(truth), CELLS, "mini")
    assert f"Headroom is not shown: {reason}." in table.notes
    assert table.headroom_columns == ()
    assert len(planned(table, "primary", "hps/")) == 8


def test_a_missing_truth_is_named(truth: dict[str, Any]) -> None:
    Path(truth["file"]).unlink()
    table = compute_table(spec_of(truth, primary={}), CELLS, "mini")
    assert "Headroom is not shown: truth.json cannot be read." in table.notes
    assert table.measures == ()


def test_every_format_shows_the_share(truth: dict[str, Any], table: Table, tmp_path: Path) -> None:
    found = table.row("hps/mix_grpo").headroom["in_domain"]
    texts = render(spec_of(truth), CELLS, tmp_path)
    (line,) = (one for one in csv_rows(texts["csv"]) if one["row"] == "hps/mix_grpo")
    assert float(line["headroom_in_domain"]) == pytest.approx(found.mean, rel=1e-6)
    assert float(line["headroom_out_of_domain_high"]) == pytest.approx(
        table.row("hps/mix_grpo").headroom["out_of_domain"].high, rel=1e-6
    )
    assert float(line["headroom_clip"]) == pytest.approx(
        table.row("hps/mix_grpo").headroom["clip"].mean, rel=1e-6
    )
    rows = {row["key"]: row for row in json.loads(texts["json"])["rows"]}
    assert rows["hps/mix_grpo"]["headroom"]["in_domain"]["mean"] == pytest.approx(found.mean)
    console = Console(file=io.StringIO(), width=250)
    print_table(table, console)
    assert isinstance(console.file, io.StringIO)
    for text in (texts["markdown"], texts["latex"], console.file.getvalue()):
        assert found.text in text
        assert str(found.ends) in text
    assert "| In-domain headroom | Out-of-domain headroom |" in texts["markdown"]
    (block,) = (block for block in blocks(table) if block.suffix == "-headroom")
    (boxes,) = (
        row
        for row in block_grid("chapter", table, block, ()).rows
        if (row[0].text, row[1].text) == ("MixGRPO", "HPS")
    )
    assert (boxes[2].text, boxes[2].interval) == (found.text, found.ends)
    parts = texts["summary"].partition("(secondary comparisons)")
    assert "**Primary comparisons**" in parts[0]
    assert parts[2].count("secondary comparisons") == 1
    one = planned(table, "primary", "hps/")[0]
    assert f"| {one.detectable:.3f} |" in parts[0]
