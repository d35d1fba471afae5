"""The command line as a user meets it: the whole path, doing nothing twice, and clear refusals."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from command_line import g2rpo, write_small_profile
from PIL import Image

from benchmarks.evaluation.results import load_cells

TABLE = {
    "name": "two_rows",
    "cells": {
        "base": {},
        "hps/g2rpo": {
            "label": "G2RPO", "method": "g2rpo", "train": ["hps"],
            "set": {"method": {"granularities": [1, 2]}},
        },
        "hps/mix_grpo": {"method": "mix_grpo", "train": ["hps"]},
    },
    "table": {
        "name": "two_rows",
        "title": "Two rows",
        "baseline": "base",
        "columns": ["hps", "clip"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small experiment and a profile on the session's tiny models."""
    folder = tmp_path_factory.mktemp("workplace")
    write_small_profile(folder / "small.yaml", smoke_assets)
    (folder / "two_rows.yaml").write_text(yaml.safe_dump(TABLE))
    return folder


@pytest.fixture(scope="module")
def finished(workplace: Path) -> Path:
    done = g2rpo(workplace, "reproduce", "two_rows.yaml", "--profile", "small.yaml")
    assert done.returncode == 0, done.stderr
    assert "MixGRPO" in done.stdout
    return workplace / "results" / "runs"


def test_the_whole_path_leaves_cells_tables_figures_and_pictures(finished: Path) -> None:
    output = finished / "smoke" / "two_rows"
    cells = load_cells(output / "cells")
    assert [cell.info.row for cell in cells] == ["base", "hps/g2rpo", "hps/mix_grpo"]
    g2rpo_cell = cells[1].info
    # One anchor of 6 steps, then for k = 0, 1, 2 and 4 samples the distinct continuation states;
    # 2 prompts and 2 iterations.
    per_prompt = 6 + 4 * ((5 + 1) + 4 + 3)
    assert g2rpo_cell.cost.rollout_evaluations == 2 * 2 * per_prompt
    assert g2rpo_cell.cost.iterations == 2
    assert cells[0].info.cost.rollout_evaluations == 0
    for name in ("two_rows.md", "two_rows.csv", "two_rows.tex", "pictures.png", "curves_hps.png"):
        assert (output / name).stat().st_size > 0
    evaluation = finished / g2rpo_cell.runs["train"] / "evaluations" / g2rpo_cell.runs["evaluation"]
    scores = pd.read_parquet(evaluation / "scores.parquet")
    assert len(scores) == 8 * 5
    assert not scores.duplicated(["prompt_id", "reward"]).any()
    kept = sorted((evaluation / "images").glob("*.png"))
    assert len(kept) == 4
    assert Image.open(kept[0]).size == (32, 32)
    manifest = json.loads((finished / g2rpo_cell.runs["train"] / "manifest.json").read_text())
    assert manifest["seed"] == 1
    assert manifest["provenance"]["weights"].keys() == {"hps", "policy"}


def test_diversity_and_drift_are_measured_and_shown(finished: Path) -> None:
    output = finished / "smoke" / "two_rows"
    base, trained, _ = load_cells(output / "cells")
    for cell in (base, trained):
        assert cell.metrics is not None
        assert len(cell.metrics) == 3 * 2
        values = cell.metrics.set_index(["metric", "prompt_id"])["value"]
        assert (values["diversity/distance"] > 0).all() and (values["diversity/distance"] < 2).all()
        assert (values["diversity/vendi"] > 1).all() and (values["diversity/vendi"] <= 2).all()
        assert ((values["drift"] > 0) == (cell is trained)).all()
        evaluation = finished / cell.info.runs["train"] / "evaluations"
        evaluation /= cell.info.runs["evaluation"]
        others = sorted(path.name for path in (evaluation / "diversity").glob("*.png"))
        assert others == ["000000_1.png", "000001_1.png"]
        # Another noise than that of the image that is scored.
        pixels = [np.asarray(Image.open(evaluation / name)).astype(int)
                  for name in ("images/000000.png", "diversity/000000_1.png")]  # fmt: skip
        assert np.abs(pixels[0] - pixels[1]).mean() > 5
    assert len(list(finished.glob("base-*/drift/*.safetensors"))) == 1
    text = (output / "two_rows.md").read_text()
    assert "| Image distance | Vendi score | Drift | Reward hacking |" in text
    rows = pd.read_csv(output / "two_rows.csv").set_index("row")
    assert rows.loc["base", "drift"] == 0
    assert rows["hacking"].isna().tolist() == [True, False, False]


def _stamps(folder: Path) -> dict[Path, int]:
    heavy = [p for p in folder.rglob("*") if p.suffix in {".safetensors", ".parquet", ".jsonl"}]
    images = folder.glob("*/evaluations/*/images/*.png")
    cells = {p for p in heavy if "cells" in p.parts}
    return {path: path.stat().st_mtime_ns for path in [*(set(heavy) - cells), *images]}


def test_a_second_time_it_only_prints_the_table(workplace: Path, finished: Path) -> None:
    before = _stamps(finished)
    assert before
    again = g2rpo(workplace, "reproduce", "two_rows.yaml", "--profile", "small.yaml")
    assert again.returncode == 0, again.stderr
    assert "MixGRPO" in again.stdout
    assert "train" not in again.stderr
    assert _stamps(finished) == before


def test_stage_by_stage_meets_the_same_run(
    workplace: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from reproduce import cli

    monkeypatch.chdir(workplace)
    for verb in (["train"], ["sample"], ["score"], ["render"]):
        cell = [] if verb == ["render"] else ["hps/g2rpo"]
        arguments = [*verb, "two_rows.yaml", *cell, "--profile", "small.yaml"]
        monkeypatch.setattr(sys, "argv", ["g2rpo", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code in (None, 0)
        assert ("G2RPO" if verb == ["render"] else "g2rpo-hps-seed1-") in capsys.readouterr().out


def test_a_failed_cell_leaves_a_marked_gap_and_the_others(workplace: Path, tmp_path: Path) -> None:
    table = yaml.safe_load(yaml.safe_dump(TABLE))
    table["cells"]["hps/mix_grpo"]["set"] = {"optimization": {"learning_rate": 1e30}}
    (tmp_path / "failing.yaml").write_text(yaml.safe_dump(table))
    profile = str(workplace / "small.yaml")
    done = g2rpo(tmp_path, "reproduce", "failing.yaml", "--profile", profile)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "1 of 3 cells failed" in done.stderr
    text = (tmp_path / "results" / "runs" / "smoke" / "two_rows" / "two_rows.md").read_text()
    assert "not finite" in text or "differs" in text
    cells = load_cells(tmp_path / "results" / "runs" / "smoke" / "two_rows" / "cells")
    assert [cell.info.row for cell in cells] == ["base", "hps/g2rpo"]


REFUSALS = {
    "unknown profile": (["reproduce", "table1", "--profile", "mimi"], "mini"),
    "unknown experiment": (["reproduce", "tabel1", "--profile", "smoke"], "table1"),
    "unknown key": (
        ["train", "two_rows.yaml", "hps/g2rpo", "-s", "optimization.learning_rat=1"],
        "learning_rate",
    ),
    "wrong type": (
        ["train", "two_rows.yaml", "hps/g2rpo", "-s", "grid.steps=many"],
        "grid.steps",
    ),
    "group of one": (
        ["train", "two_rows.yaml", "hps/g2rpo", "-s", "rollout.group_size=1"],
        "group_size",
    ),
    "granularity 0": (
        ["train", "two_rows.yaml", "hps/g2rpo", "-s", "method.granularities=[0, 1]"],
        "granularities",
    ),
    "step beyond the grid": (
        ["train", "two_rows.yaml", "hps/g2rpo", "-s", "method.stochastic_steps=[6]"],
        "stochastic_steps",
    ),
    "step without continuation": (
        ["train", "two_rows.yaml", "hps/g2rpo", "-s", "method.stochastic_steps=[5]"],
        "stochastic_steps",
    ),
    "unregistered reward": (
        [
            "train", "two_rows.yaml", "hps/g2rpo",
            "-s", "rewards.hps.reward.model=pick_scor",
        ],
        "pick_score",
    ),
    "unknown cell": (["train", "two_rows.yaml", "hps/g2rp"], "hps/g2rpo"),
    "not an assignment": (["train", "two_rows.yaml", "hps/g2rpo", "-s", "seed"], "key=value"),
    "missing prompts": (
        ["train", "two_rows.yaml", "hps/g2rpo", "-s", "prompts.file=absent.txt"],
        "absent.txt",
    ),
    "missing policy": (
        ["train", "two_rows.yaml", "hps/g2rpo", "-s", "policy.source=./absent"],
        "absent",
    ),
    "paper scale": (["reproduce", "table1", "--profile", "flux"], "PROFILE=mini"),
    "bad seeds": (
        ["reproduce", "two_rows.yaml", "--profile", "small.yaml", "--seeds", "1,x"],
        "--seeds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSALS))
def test_a_mistake_gets_one_line_and_exit_code_2(
    workplace: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: a subprocess for each would take minutes and show nothing more."""
    from reproduce import cli

    arguments, expected = REFUSALS[case]
    if "--profile" not in arguments:
        arguments = [*arguments, "--profile", "small.yaml"]
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PATH", str(workplace / "no commands"))  # this machine may have SLURM
    monkeypatch.setattr(sys, "argv", ["g2rpo", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err.strip()
    assert expected in told
    assert told.startswith("error: ")
    assert len([line for line in told.splitlines() if not line.startswith("WARNING")]) == 1


def test_a_mistake_from_the_shell_has_no_traceback(workplace: Path) -> None:
    done = g2rpo(workplace, "reproduce", "tabel1", "--profile", "small.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_judge_that_comes_later_scores_what_is_there(finished: Path, tmp_path: Path) -> None:
    workplace = tmp_path / "later"
    shutil.copytree(finished.parents[1], workplace)
    profile = yaml.safe_load((workplace / "small.yaml").read_text())
    profile["rewards"]["clip_again"] = profile["rewards"]["clip"]
    (workplace / "small.yaml").write_text(yaml.safe_dump(profile))
    runs = workplace / "results" / "runs"
    trained = {path: path.stat().st_mtime_ns for path in runs.glob("*/manifest.json")}
    for _ in range(2):
        done = g2rpo(workplace, "reproduce", "two_rows.yaml", "--profile", "small.yaml")
        assert done.returncode == 0, done.stderr
    assert (
        "everything is complete"
        in g2rpo(workplace, "plan", "two_rows.yaml", "--profile", "small.yaml").stdout
    )
    for cell in load_cells(runs / "smoke" / "two_rows" / "cells"):
        scores = cell.scores.pivot_table(index="prompt_id", columns="reward", values="score")
        assert len(scores) == 8
        assert (scores["clip_again"] == scores["clip"]).all()
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
