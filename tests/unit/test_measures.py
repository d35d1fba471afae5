"""Metrics beside the scores: in cells, in every table format, and as reward hacking."""

import dataclasses
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import cell_factory
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from cell_factory import (
    TABLE1,
    csv_rows,
    make_cell,
    make_metrics,
    make_scores,
    make_table_cells,
)
from rich.console import Console

from benchmarks.evaluation.metrics import DISTANCE, DRIFT, VENDI
from benchmarks.evaluation.protocol import DiversityConfig, DriftConfig
from benchmarks.evaluation.results import (
    Cell,
    Protocol,
    RowScores,
    gather_rows,
    load_cell,
    save_cell,
)
from benchmarks.evaluation.statistics import Label
from g2rpo.config import validate
from g2rpo.errors import UserError
from reproduce.experiment.table import TableSpec
from reproduce.tables.comparisons import ComparedRows, compare_metric
from reproduce.tables.model import RewardHacking
from reproduce.tables.table import compute_table
from reproduce.tables.terminal import print_table

SPEC = validate(TableSpec, TABLE1, "table1")
METRICS = {DISTANCE: 0.4, VENDI: 2.5, DRIFT: 0.01234}
PROTOCOL = Protocol(
    name="test-captions",
    hash="0123456789ab",
    diversity=DiversityConfig(prompts=6, images=4),
    drift=DriftConfig(prompts=6, sigmas=(0.9, 0.1)),
)
SCORES = make_scores({"hps": 0.3, "clip": 0.4})


def measured(cell: Cell, metrics: pd.DataFrame | None) -> Cell:
    info = cell.info.model_copy(update={"protocol": PROTOCOL})
    return dataclasses.replace(cell, info=info, metrics=metrics)


def measured_cells(seeds: int = 3) -> list[Cell]:
    cells = []
    for number, cell in enumerate(make_table_cells(SPEC, seeds=seeds)):
        metrics = make_metrics(METRICS, seed=number)
        if cell.info.seed is None:
            metrics.loc[metrics["metric"] == DRIFT, "value"] = 0.0
        cells.append(measured(cell, metrics))
    return cells


class TestCells:
    def test_round_trip(self, tmp_path: Path) -> None:
        cell = measured(make_cell("base", seed=None, scores=SCORES), make_metrics(METRICS))
        found = load_cell(save_cell(cell, tmp_path))
        assert found.metrics is not None
        assert cell.metrics is not None
        pd.testing.assert_frame_equal(found.metrics, cell.metrics)
        assert found.metrics["value"].dtype == np.float64
        assert found.info == cell.info
        # Saved again without, the old file does not stay behind.
        assert load_cell(save_cell(measured(cell, None), tmp_path)).metrics is None
        assert not list(tmp_path.glob("*metrics*"))

    def test_cells_without_the_metrics_keys_are_read(self, tmp_path: Path) -> None:
        path = save_cell(make_cell("base", seed=None, scores=SCORES), tmp_path)
        document = json.loads(path.read_text())
        del document["metrics_sha256"], document["document_sha256"]
        del document["cell"]["protocol"]["diversity"], document["cell"]["protocol"]["drift"]
        path.write_text(json.dumps(document))
        assert load_cell(path).metrics is load_cell(path).info.protocol.diversity is None

    @pytest.mark.parametrize(
        ("metrics", "message"),
        [
            (make_metrics(METRICS).drop(columns="value"), "missing column 'value'"),
            (
                make_metrics(METRICS).assign(value=np.nan),
                "'p000' under 'diversity/distance' is not finite",
            ),
            (
                pd.concat([make_metrics({DRIFT: 1.0})] * 2),
                "prompt 'p000' under 'drift' occurs twice",
            ),
            (make_metrics({DRIFT: 1.0}, prompts=30), "prompt 'p020' has metrics but no scores"),
        ],
    )
    def test_bad_metrics_are_refused_by_name(self, metrics: pd.DataFrame, message: str) -> None:
        with pytest.raises(UserError, match=message):
            measured(make_cell("base", seed=None, scores=SCORES), metrics)

    def test_rows_hold_what_all_their_cells_have(self) -> None:
        cells = [
            measured(make_cell("g2rpo", seed=seed, scores=SCORES), make_metrics(METRICS, seed=seed))
            for seed in (2, 1)
        ]
        row = gather_rows(cells)["g2rpo"]
        assert row.metrics == (DISTANCE, VENDI, DRIFT)
        values, prompts = row.metric(VENDI, [1])
        frame = cells[1].metrics
        assert frame is not None
        expected = frame[frame["metric"] == VENDI].set_index("prompt_id")["value"]
        assert values.shape == (1, 1, 6)
        assert values[0, 0].tolist() == [expected[prompt] for prompt in prompts]
        only_drift = make_metrics({DRIFT: 0.1})
        assert gather_rows([cells[0], measured(cells[1], only_drift)])["g2rpo"].metrics == (DRIFT,)
        fewer = make_metrics(METRICS, prompts=5)
        with pytest.raises(UserError, match="measured on different prompts"):
            gather_rows([cells[0], measured(cells[1], fewer)])["g2rpo"].metric(DRIFT)


def render(cells: Sequence[Cell], folder: Path, profile: str = "mini") -> dict[str, str]:
    return cell_factory.render(SPEC, cells, folder, profile)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The formats of a table with metrics."""
    return render(measured_cells(), tmp_path_factory.mktemp("table"))


class TestTables:
    def test_csv_holds_what_plain_loops_find(self, texts: dict[str, str]) -> None:
        cells = measured_cells()
        rows = {row["row"]: row for row in csv_rows(texts["csv"])}
        for key in ("hps/g2rpo", "hps-clip/mix_grpo"):
            for metric in METRICS:
                means = []
                for cell in cells:
                    if cell.info.row == key:
                        assert cell.metrics is not None
                        table = cell.metrics.itertuples(index=False)
                        found = [value for _, name, value in table if name == metric]
                        means.append(sum(found) / len(found))
                interval = scipy.stats.ttest_1samp(means, 0).confidence_interval(0.95)
                texts = [rows[key][f"{metric}{end}"] for end in ("", "_low", "_high")]
                assert [float(text) for text in texts] == pytest.approx(
                    [sum(means) / 3, interval.low, interval.high], rel=1e-6
                )
        assert [rows["base"][f"drift{end}"] for end in ("", "_low", "_high")] == ["0"] * 3
        heads = list(rows["base"])
        assert heads.index("attributes_best") < heads.index(DISTANCE) < heads.index(VENDI)
        assert heads.index("drift_high") < heads.index("hacking")
        assert heads.index("hacking_fell") < heads.index("rollout_evaluations")

    def test_markdown_shows_them_between_rewards_and_costs(self, texts: dict[str, str]) -> None:
        text = texts["markdown"]
        lines = [line for line in text.splitlines() if line.startswith("|")]
        head = [cell.strip() for cell in lines[0].split("|")]
        place = head.index("Image distance")
        assert head[place : place + 4] == [
            "Image distance", "Vendi score", "Drift", "Reward hacking",
        ]  # fmt: skip
        assert head[place - 1] == "Interval"
        assert head[place + 4] == "Rollout evaluations"
        base, trained = ([cell.strip() for cell in line.split("|")] for line in lines[2:4])
        assert len(head) == len(base) == len(trained) == len(lines[1].split("|"))
        # Three figures of the largest drift, about 0.012, in every row.
        assert base[place + 2].startswith("0.0000<br><sub>[0.0000, 0.0000]")
        assert re.match(r"0\.\d{4}<br><sub>\[-?0\.\d{4}, 0\.\d{4}\]", trained[place + 2])
        assert re.match(r"2\.\d{3}<br><sub>\[2\.\d{3}, 2\.\d{3}\]", trained[place + 1])
        assert base[place + 3] == "–"
        assert "Diversity: 4 images per prompt, first 6 prompts, features of clip." in text
        assert "Drift: first 6 prompts, sigma 0.9, 0.1." in text
        for start in ("- Image distance:", "- Vendi score (", "- Drift: mean", "- Reward hacking:"):
            assert text.count(f"\n{start}") == 1

    def test_latex_and_terminal_have_a_table_of_their_own(self, texts: dict[str, str]) -> None:
        latex = texts["latex"]
        (part,) = re.findall(
            r"\\begin\{tabular\}\{@\{\}lcccl@\{\}\}.*?\\end\{tabular\}", latex, re.S
        )
        assert r"Method & Image distance & Vendi score & Drift & Reward hacking" in part
        rows = [line for line in part.splitlines() if line.endswith(r"\\") and "&" in line]
        assert {len(row.split("&")) for row in rows if "HPS" not in row} == {5}
        assert latex.isascii()
        console = Console(record=True, width=160, file=io.StringIO())
        print_table(compute_table(SPEC, measured_cells(), "mini"), console)
        text = console.export_text()
        assert text.index("Diversity, drift") < text.index("Training cost")
        assert "Reward hacking: yes if" in text

    def test_rows_without_metrics_have_gaps(self, tmp_path: Path) -> None:
        cells = [
            measured(cell, None) if cell.info.row.startswith("hps/") else cell
            for cell in measured_cells()
        ]
        texts = render(cells, tmp_path, profile="flux")
        rows = csv_rows(texts["csv"])
        for row in rows:
            if row["group"] == "HPS" or row["source"] == "paper":
                assert row[VENDI] == row[DRIFT] == ""
            else:
                assert float(row[VENDI]) > 2
            if row["source"] == "paper":
                assert row["hacking"] == ""
        lengths = {len(re.split(r"(?<!\\)\|", one)) for one in texts["markdown"].splitlines()
                   if one.startswith("|")}  # fmt: skip
        assert len(lengths) == 1

    @pytest.mark.parametrize("styles", [[None], ["photo"]])
    def test_without_metrics_or_styles_tables_have_none(
        self, styles: list[str | None], tmp_path: Path
    ) -> None:
        texts = render([styled(cell, styles) for cell in make_table_cells(SPEC)], tmp_path)
        assert "by_style" not in texts
        for text in texts.values():
            for word in ("Vendi", "Drift", "hacking"):
                assert word.lower() not in text.lower()


def rows_of(
    hps: Sequence[float], clip: Sequence[float], vendi: float = 2.5
) -> dict[str, RowScores]:
    """The base, and a row trained on HPS whose seeds are above it by so much."""
    base = make_cell("base", seed=None, scores=SCORES)
    cells = [measured(base, make_metrics(METRICS, seed=1))]
    for seed, (one, two) in enumerate(zip(hps, clip, strict=True)):
        scores = make_scores({"hps": 0.3 + one, "clip": 0.4 + two})
        cell = make_cell("hps/g2rpo", seed=seed, scores=scores, train=("hps",))
        cells.append(measured(cell, make_metrics(METRICS | {VENDI: vendi}, seed=10 + seed)))
    return gather_rows(cells)


def verdict(
    rows: dict[str, RowScores],
    rewards: Sequence[str] = ("hps", "clip"),
    baseline: str | None = "base",
    about: Label | None = None,
) -> RewardHacking | None:
    label: Label = "method" if len(rows["hps/g2rpo"].cells) >= 3 else "checkpoint"
    return ComparedRows(rows, rewards).hacking("hps/g2rpo", baseline, about or label)


UP, DOWN, SAME = (0.1, 0.101, 0.102), (-0.1, -0.101, -0.102), (0.0, 0.05, -0.05)


class TestRewardHacking:
    @pytest.mark.parametrize(
        ("hps", "clip", "vendi", "rose", "fell"),
        [
            *((UP[:seeds], DOWN[:seeds], 2.5, ("hps",), ("clip",)) for seeds in (1, 2, 3)),
            (UP, SAME, 1.5, ("hps",), (VENDI,)),
            (UP, UP, 3.5, ("hps",), ()),
            (DOWN, DOWN, 2.5, (), ("clip",)),
            (UP, (-0.3, 0.1, 0.05), 2.5, ("hps",), ()),
            ((0.3, -0.1, 0.0), DOWN, 2.5, (), ("clip",)),
            # t = 5.6 with two degrees of freedom: p = 0.03 alone, more after the correction.
            (UP, tuple(-0.1 + step * 0.1 * 3**0.5 / 5.6 for step in (-1, 0, 1)), 2.5, ("hps",), ()),
        ],
    )
    def test_what_rose_and_what_fell(
        self,
        hps: Sequence[float],
        clip: Sequence[float],
        vendi: float,
        rose: tuple[str, ...],
        fell: tuple[str, ...],
    ) -> None:
        expected = RewardHacking(flagged=bool(rose and fell), rose=rose, fell=fell)
        assert verdict(rows_of(hps, clip, vendi)) == expected

    def test_in_domain_rewards_may_fall(self) -> None:
        rows = rows_of(UP, DOWN)
        info = {"train_rewards": ("hps", "clip")}
        cells = [
            dataclasses.replace(cell, info=cell.info.model_copy(update=info))
            for cell in rows["hps/g2rpo"].cells
        ]
        found = verdict(rows | gather_rows(cells))
        assert found == RewardHacking(flagged=False, rose=("hps",), fell=())

    def test_without_a_comparison_there_is_no_verdict(self) -> None:
        rows = rows_of(UP, DOWN)
        assert verdict(rows, baseline=None) is None
        assert ComparedRows(rows, ["hps"]).hacking("base", "base", "checkpoint") is None
        assert verdict(rows, ["clip"]) is None
        # What the table's interval is about is not what could be compared.
        assert verdict(rows, about="checkpoint") is None
        base = rows["base"].cells[0]
        moved = base.info.model_copy(update={"protocol": Protocol(name="o", hash="o")})
        assert verdict(rows | gather_rows([dataclasses.replace(base, info=moved)])) is None

    def test_metrics_of_other_prompts_are_not_compared(self) -> None:
        rows = rows_of(UP, SAME, vendi=1.5)
        fewer = measured(rows["base"].cells[0], make_metrics(METRICS, prompts=5))
        other = gather_rows([fewer])["base"]
        assert compare_metric(rows["hps/g2rpo"], other, VENDI) is None
        found = compare_metric(rows["hps/g2rpo"], rows["base"], VENDI)
        assert found is not None
        assert found.difference == pytest.approx(-1, abs=0.05)

    def test_tables_say_it(self, tmp_path: Path) -> None:
        rows = rows_of(UP, DOWN, vendi=1.5)
        cells = [cell for row in rows.values() for cell in row.cells]
        texts = render(cells, tmp_path, profile="smoke")
        assert "| yes (CLIP, Vendi score) |" in texts["markdown"]
        assert "& yes (CLIP, Vendi score)" in texts["latex"]
        by_key = {row["row"]: row for row in csv_rows(texts["csv"])}
        assert by_key["hps/g2rpo"]["hacking"] == "1"
        assert by_key["hps/g2rpo"]["hacking_fell"] == f"clip;{VENDI}"
        assert by_key["base"]["hacking"] == by_key["hps/mix_grpo"]["hacking"] == ""
        # Without a base there is no verdict, neither yes nor no.
        alone = render(rows["hps/g2rpo"].cells, tmp_path, profile="smoke")
        assert {row["hacking"] for row in csv_rows(alone["csv"])} == {""}
        assert "yes (" not in alone["markdown"]


def styled(cell: Cell, styles: Sequence[str | None]) -> Cell:
    """The cell, its prompts' styles in turn."""
    prompts = sorted(cell.scores["prompt_id"].unique())
    style = {prompt: styles[number % len(styles)] for number, prompt in enumerate(prompts)}
    scores = cell.scores.assign(style=cell.scores["prompt_id"].map(style))
    return dataclasses.replace(cell, scores=scores)


class TestStyles:
    def test_each_style_has_the_scores_of_its_prompts(self, tmp_path: Path) -> None:
        cells = [styled(cell, ["anime", "photo", None, "anime"]) for cell in make_table_cells(SPEC)]
        kept = load_cell(save_cell(cells[0], tmp_path / "cells"))
        pd.testing.assert_frame_equal(kept.scores, cells[0].scores)
        texts = render(cells, tmp_path)
        rows = csv_rows(texts["by_style_csv"])
        assert [row["group"] for row in rows] == ["anime"] * 11 + ["photo"] * 11
        for row in rows:
            means = []
            for cell in cells:
                if cell.info.row == row["row"]:
                    table = cell.scores.itertuples(index=False)
                    found = [
                        float(one.score)
                        for one in table
                        if (one.reward, one.style) == ("clip", row["group"])
                    ]
                    means.append(sum(found) / len(found))
            assert float(row["clip"]) == pytest.approx(sum(means) / len(means), rel=1e-6)
            assert float(row["clip_low"]) < float(row["clip"]) < float(row["clip_high"])
            assert row["interval"] == ("checkpoint" if row["row"] == "base" else "method")
        text = texts["by_style"]
        assert text.startswith("### Table 1: held-out scores, by style (profile `mini`)")
        assert "| anime | G²RPO (HPS) | 0." in text
        assert "- Prompts: anime 10, photo 5." in text
        assert (tmp_path / "table1_by_style.md").exists()
        rare = ["anime"] * 10 + ["photo"] * 9 + ["rare"]
        text = render([styled(cell, rare) for cell in make_table_cells(SPEC)], tmp_path)["by_style"]
        assert "- Omitted, with a single prompt: rare." in text
        assert "| rare |" not in text
