"""What an experiment on credit leaves for people, from made-up measurements."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import write_small_profile
from matplotlib.figure import Figure
from run_folders import PROVENANCE
from typer.testing import CliRunner

from g2rpo.errors import UserError
from reproduce.cli import app
from reproduce.experiment import expand, load_experiment, load_profile
from reproduce.experiment.layout import Layout
from reproduce.runs.folders import write_manifest
from reproduce.tables.credit import (
    Measured,
    draw_quantity,
    named_rollouts,
    over_seeds,
    publish_credit,
    steps_text,
)

WINDOWS = ((0, [0, 1]), (1, [1, 2]), (4, [2]))


def rollout(iteration: int, steps: Sequence[int], base: float) -> dict[str, Any]:
    """A rollout as its stage writes it; a step that is alone explains everything."""
    alone = len(steps) == 1
    return {
        "iteration": iteration,
        "signal": 2.0 * base,
        "noise": 4.0,
        "velocity_evaluations": 8,
        "steps": [
            {
                "step": step,
                "sigma": 0.9 - step / 5,
                "explained": {"hps": 1.0 if alone else base + step / 100},
                "signal": base + step,
                "noise": 10.0,
            }
            for step in steps
        ],
    }


@pytest.fixture
def workplace(smoke_assets: Path, tmp_path: Path) -> Path:
    """An experiment of two methods, one with a window that moves, measured at three seeds."""
    write_small_profile(tmp_path / "small.yaml", smoke_assets)
    mix = {"method": {"window_size": 2, "interval": 1}}
    experiment = {
        "name": "small_credit",
        "credit": {"samples": 4, "repeats": 3, "rollouts": 3},
        "cells": {
            "hps/dance_grpo": {"method": "dance_grpo", "train": ["hps"]},
            "hps/mix_grpo": {"method": "mix_grpo", "train": ["hps"], "set": mix},
        },
        "table": {
            "name": "small_credit",
            "title": "Credit",
            "columns": [{"reward": "hps", "label": "HPS"}],
        },
    }
    (tmp_path / "credit.yaml").write_text(yaml.safe_dump(experiment))
    return tmp_path


def measure(workplace: Path, layout: Layout, seeds: Sequence[int] = (1, 2, 3)) -> None:
    """Writes what the stages of the experiment would, and what is made of it."""
    loaded = load_experiment(str(workplace / "credit.yaml"))
    profile = load_profile(str(workplace / "small.yaml"))
    cells = expand(loaded, profile, seeds)
    for cell in cells:
        windows = WINDOWS if cell.method == "mix_grpo" else ((0, [0, 1, 2]),)
        rollouts = [rollout(at, steps, 0.1 * (cell.seed or 0)) for at, steps in windows]
        written = {"inputs": {"seed": cell.seed}, "provenance": PROVENANCE, "rollouts": rollouts}
        write_manifest(layout.credit(cell), written)
    publish_credit(loaded, profile, cells, (), layout)


def tables_of(text: str) -> list[dict[str, list[str]]]:
    """The tables of a Markdown text: by the first column, the means of the others."""
    found: list[dict[str, list[str]]] = []
    for line in text.splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| Method"):
            found.append({})
        elif line.startswith("| "):
            found[-1][first] = [cell.partition("<br>")[0] for cell in cells]
    return found


def test_each_rollout_of_a_method_has_a_line_of_its_own(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = Layout(workplace / "runs", workplace / "tables")
    measure(workplace, layout)
    output = layout.experiment("smoke", "small_credit")
    shares, ratios = tables_of((output / "credit.md").read_text())
    assert shares == {
        "DanceGRPO": ["0.200", "0.210", "0.220"],
        "MixGRPO, steps 0 to 1": ["0.200", "0.210", ""],
        "MixGRPO, steps 1 to 2": ["", "0.210", "0.220"],
        "MixGRPO, step 2": ["", "", "1.000"],
    }
    assert list(shares) == list(ratios)
    assert ratios["MixGRPO, step 2"] == ["", "", "0.220", "0.100"]
    assert "Mean over 3 seeds" in (output / "credit.md").read_text()
    shown = capsys.readouterr().out
    assert all(shown.count(label) == 2 for label in list(shares)[1:])
    rows = list(csv.DictReader((output / "credit.csv").open()))
    assert len(rows) == 3 * (3 + 2 + 2 + 1)
    (first, *_) = json.loads((output / "credit.json").read_text())["cells"]
    assert first["rollouts"] == [rollout(0, [0, 1, 2], 0.1)]


def test_rollouts_are_named_by_their_steps() -> None:
    assert steps_text([5]) == "step 5"
    assert steps_text([2, 3, 4]) == "steps 2 to 4"
    assert steps_text([0, 2, 3]) == "steps 0, 2, 3"
    rollouts = [rollout(7, [0, 1], 0.1), rollout(0, [0, 1], 0.1), rollout(3, [1], 0.1)]
    labels = [
        label for label, _ in named_rollouts(Measured("a", "Mine", 1, {"rollouts": rollouts}))
    ]
    assert labels == [
        "Mine, steps 0 to 1, iteration 0", "Mine, step 1", "Mine, steps 0 to 1, iteration 7",
    ]  # fmt: skip


def test_every_line_of_the_figure_looks_different() -> None:
    axes = Figure().subplots()
    found = over_seeds((f"line {n}", step, 0.1) for n in range(12) for step in (0, 1))
    draw_quantity(axes, found, {0: 0.9, 1: 0.5})
    lines = axes.get_lines()[:12]
    assert len({(one.get_color(), one.get_marker()) for one in lines}) == 12


@pytest.mark.parametrize("command", ["render", "report"])
def test_credit_has_no_cells_to_render_or_report(command: str) -> None:
    asked = CliRunner().invoke(app, [command, "credit", "--profile", "mini"])
    assert isinstance(asked.exception, UserError)
    assert "run `g2rpo reproduce credit --profile mini`" in str(asked.exception)
