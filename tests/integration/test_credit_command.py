"""``g2rpo reproduce`` of an experiment on credit: stages, outputs, refusals."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import g2rpo_here, write_small_profile
from typer.testing import CliRunner

from g2rpo.errors import UserError
from reproduce.cli import app
from reproduce.experiment import load_experiment

EXPERIMENT: dict[str, Any] = {
    "name": "small_credit",
    "credit": {"samples": 4, "repeats": 3, "rollouts": 2},
    "cells": {
        "hps/g2rpo": {
            "label": "G2RPO", "method": "g2rpo", "train": ["hps"],
            "set": {"method": {"granularities": [1, 2]}},
        },
        "hps/mix_grpo": {
            "method": "mix_grpo", "train": ["hps"],
            "set": {"method": {"window_size": 2, "interval": 1}},
        },
    },
    "table": {
        "name": "small_credit",
        "title": "Credit",
        "columns": [{"reward": "hps", "label": "HPS"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("credit")
    write_small_profile(folder / "small.yaml", smoke_assets)
    (folder / "credit.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    return folder


def test_credit_is_measured_once_and_shown(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("reproduce", "credit.yaml", "--profile", "small.yaml", "--jobs", "1")
    assert g2rpo_here(workplace, *command) == 0
    printed = capsys.readouterr().out
    assert "G2RPO" in printed
    assert "credit.json" in printed
    output = workplace / "results" / "runs" / "smoke" / "small_credit"
    for name in ("credit.md", "credit.png", "credit.pdf"):
        assert (output / name).stat().st_size > 0
    document = json.loads((output / "credit.json").read_text())
    by_row = {cell["row"]: cell for cell in document["cells"]}
    (rollout,) = by_row["hps/g2rpo"]["rollouts"]
    assert [step["step"] for step in rollout["steps"]] == [0, 1, 2]
    assert all(step["explained"]["hps"] == pytest.approx(1, abs=1e-3) for step in rollout["steps"])
    windows = [r["iteration"] for r in by_row["hps/mix_grpo"]["rollouts"]]
    assert windows == [0, 1]
    assert by_row["hps/g2rpo"]["provenance"]["weights"].keys() == {"hps", "policy"}
    rows = list(csv.DictReader((output / "credit.csv").open()))
    assert len(rows) == 3 + 2 * 2
    (manifest,) = (workplace / "results" / "runs").glob("credit-g2rpo-hps-seed1-*/manifest.json")
    written = manifest.stat().st_mtime_ns
    assert g2rpo_here(workplace, *command) == 0
    assert capsys.readouterr().out == printed
    assert manifest.stat().st_mtime_ns == written


def test_a_plan_of_credit_has_no_training(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    command = ["plan", "credit.yaml", "--profile", "small.yaml", "--seeds", "5,6"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    kinds = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line.split()}
    assert kinds["credit"] == "4"
    assert "train" not in kinds


def test_credit_of_the_base_is_refused(workplace: Path) -> None:
    wrong = {**EXPERIMENT, "cells": {**EXPERIMENT["cells"], "base": {}}}
    (workplace / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(UserError, match=r"cells\.base has none"):
        load_experiment(str(workplace / "wrong.yaml"))
