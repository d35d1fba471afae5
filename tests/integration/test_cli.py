"""The command line as a user meets it: the whole path, doing nothing twice, and clear refusals."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from command_line import g2rpo_here, small_profile_data, write_small_profile
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
    data = small_profile_data(smoke_assets)
    rewards = {name: data["rewards"][name] for name in ("hps", "clip")}
    write_small_profile(folder / "small.yaml", smoke_assets, rewards=rewards)
    rewards["attributes"] = data["rewards"]["attributes"]
    for name, texts in (("one", ["a red circle"]), ("strange", ["a zebra", "two zebras"])):
        test = folder / f"{name}.txt"
        test.write_text("".join(f"{text}\n" for text in texts))
        prompts = data["prompts"] | {"test": str(test)}
        write_small_profile(folder / f"{name}.yaml", smoke_assets, rewards=rewards, prompts=prompts)
    (folder / "two_rows.yaml").write_text(yaml.safe_dump(TABLE))
    return folder


@pytest.fixture(scope="module")
def finished(workplace: Path) -> Path:
    arguments = ("two_rows.yaml", "--profile", "small.yaml", "--jobs", "1")
    assert g2rpo_here(workplace, "reproduce", *arguments) == 0
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
    assert len(scores) == 8 * 2
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


def test_a_second_time_it_only_prints_the_table(
    workplace: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _stamps(finished)
    assert before
    assert g2rpo_here(workplace, "reproduce", "two_rows.yaml", "--profile", "small.yaml") == 0
    printed = capsys.readouterr()
    assert "MixGRPO" in printed.out
    assert "train" not in printed.err
    assert _stamps(finished) == before


@pytest.mark.parametrize(
    ("verb", "shown"),
    [(verb, "g2rpo-hps-seed1-") for verb in ("train", "sample", "score")] + [("render", "G2RPO")],
)
def test_stage_by_stage_finds_the_same_run(
    workplace: Path, finished: Path, verb: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _stamps(finished)
    cell = [] if verb == "render" else ["hps/g2rpo"]
    assert g2rpo_here(workplace, verb, "two_rows.yaml", *cell, "--profile", "small.yaml") == 0
    assert shown in capsys.readouterr().out
    assert _stamps(finished) == before


def test_a_failed_cell_leaves_a_marked_gap_and_the_others(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.parents[1], tmp_path, dirs_exist_ok=True)
    table = yaml.safe_load(yaml.safe_dump(TABLE))
    table["cells"]["hps/mix_grpo"]["set"] = {"optimization": {"learning_rate": 1e19}}
    (tmp_path / "failing.yaml").write_text(yaml.safe_dump(table))
    assert g2rpo_here(tmp_path, "reproduce", "failing.yaml", "--profile", "small.yaml") == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert "1 of 3 cells failed" in errors
    output = tmp_path / "results" / "runs" / "smoke" / "two_rows"
    text = (output / "two_rows.md").read_text()
    assert "not finite" in text or "differs" in text
    rows = pd.read_csv(output / "two_rows.csv").set_index("row")
    assert rows["hps"].isna().tolist() == [False, False, True]


REFUSALS = {
    "unknown profile": (["reproduce", "table1", "--profile", "mimi"], "mini"),
    "unknown experiment": (["reproduce", "tabel1", "--profile", "smoke"], "table1"),
    "unknown key": (
        ["train", "two_rows.yaml", "hps/g2rpo", "-s", "optimization.learning_rat=1"],
        "learning_rate",
    ),
    "renamed key": (
        ["config", "two_rows.yaml", "hps/g2rpo", "-s", "optimization.optimizer_step=x"],
        "renamed to 'update_every'",
    ),
    "unknown cell": (["train", "two_rows.yaml", "hps/g2rp"], "hps/g2rpo"),
    "not an assignment": (["train", "two_rows.yaml", "hps/g2rpo", "-s", "seed"], "key=value"),
    "size that cannot be packed": (
        ["train", "two_rows.yaml", "hps/g2rpo", "-s", "policy.width=44"],
        "width 44 is not divisible by 8",
    ),
    "missing prompts": (
        ["train", "two_rows.yaml", "hps/g2rpo", "-s", "prompts.file=absent.txt"],
        "absent.txt",
    ),
    "missing policy": (
        ["train", "two_rows.yaml", "hps/g2rpo", "-s", "policy.source=./absent"],
        "absent",
    ),
    "paper scale": (["reproduce", "table1", "--profile", "flux"], "--profile mini"),
    "bad seeds": (
        ["reproduce", "two_rows.yaml", "--profile", "small.yaml", "--seeds", "1,x"],
        "--seeds",
    ),
    "one held-out prompt": (
        ["reproduce", "two_rows.yaml", "--profile", "one.yaml"],
        "one.txt: has one prompt; an interval needs at least two",
    ),
    "held-out prompt that a reward cannot score": (
        ["reproduce", "two_rows.yaml", "--profile", "strange.yaml"],
        "reward attributes: cannot score the prompt 'a zebra'",
    ),
    "unknown cell to run": (["plan", "two_rows.yaml", "--cells", "base,clip/*"], "'clip/*'"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSALS))
def test_a_mistake_gets_one_line_and_exit_code_2(
    workplace: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, expected = REFUSALS[case]
    if "--profile" not in arguments:
        arguments = [*arguments, "--profile", "small.yaml"]
    monkeypatch.setenv("PATH", str(workplace / "no commands"))  # this machine may have SLURM
    assert g2rpo_here(workplace, *arguments) == 2
    message = capsys.readouterr().err.strip()
    assert expected in message
    assert message.startswith("error: ")
    assert len([line for line in message.splitlines() if not line.startswith("WARNING")]) == 1


def test_only_the_chosen_cells_are_planned(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "table1", "--profile", "mini", "--all", "--cells", "base, hps/g2rpo*"]
    assert g2rpo_here(workplace, *command) == 0
    found = set(re.findall(r"\b(?:base\b|hps\w*/\w+)", capsys.readouterr().out))
    assert found == {"base", "hps/g2rpo", "hps/g2rpo_no_mgai"}


def test_a_policy_is_planned_before_it_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(source: str, guidance: float) -> tuple[float, str]:
        images = {"resolution": 512, "guidance_scale": guidance}
        profile = {
            "name": "mine", "extends": "flux-lora", "description": "Another policy.",
            "paper_model": False, "policy": {"source": source, **images},
            "training": {"lora": {"rank": 32, "alpha": 64}},
            "evaluation": {"grid": {"schedule": "shifted", "shift": 3.0}, **images},
        }  # fmt: skip
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(profile))
        command = ["plan", "table1", "--profile", "mine.yaml", "--cells", "hps/g2rpo"]
        assert g2rpo_here(tmp_path, *command) == 0
        told = capsys.readouterr().out
        (hours,) = re.findall(r"^train\s.*~([\d.,]+)", told, re.MULTILINE)
        return float(hours.replace(",", "")), told

    medium = "stabilityai/stable-diffusion-3.5-medium"
    (guided, told), (unguided, _), (flux, _) = (
        plan(medium, 4.5), plan(medium, 1.0), plan("black-forest-labs/FLUX.1-dev", 3.5),
    )  # fmt: skip
    assert 1.5 * unguided < guided < 2 * unguided < flux
    assert "10.4 GiB to encode prompts" in told and "planned as" not in told
    unknown, told = plan("nobody/nothing", 4.5)
    assert unknown == flux
    assert "policy nobody/nothing is neither on this machine nor in the catalogue" in told


def test_a_reward_model_added_later_scores_the_same_images(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.parents[1], tmp_path, dirs_exist_ok=True)
    profile = yaml.safe_load((tmp_path / "small.yaml").read_text())
    profile["rewards"]["clip_again"] = profile["rewards"]["clip"]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(profile))
    runs = tmp_path / "results" / "runs"
    trained = {path: path.stat().st_mtime_ns for path in runs.glob("*/manifest.json")}
    arguments = ("two_rows.yaml", "--profile", "small.yaml")
    assert g2rpo_here(tmp_path, "reproduce", *arguments, "--jobs", "1") == 0
    assert g2rpo_here(tmp_path, "plan", *arguments) == 0
    assert "everything is complete" in capsys.readouterr().out
    for cell in load_cells(runs / "smoke" / "two_rows" / "cells"):
        scores = cell.scores.pivot_table(index="prompt_id", columns="reward", values="score")
        assert len(scores) == 8
        assert (scores["clip_again"] == scores["clip"]).all()
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
