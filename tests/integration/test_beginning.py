"""A run that another one has partly trained ends with the weights of its own training."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import small_profile_data
from training_runs import weights

from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.training.checkpoint.folder import checkpoint_folder
from g2rpo.training.metrics import METRICS_FILE, read_metrics
from reproduce.experiment import Experiment, Profile, ResolvedCell, expand
from reproduce.experiment.fingerprint import train_inputs
from reproduce.experiment.layout import Layout
from reproduce.runs.folders import read_trained
from reproduce.stages.beginning import without_length
from reproduce.stages.training import Train


def cell(iterations: int, name: str = "g2rpo", **changes: Any) -> dict[str, Any]:
    settings = {
        "optimization": {"iterations": iterations},
        "checkpoints": {"every": 1, "keep_every": 1},
    }
    return {"method": name, "train": ["hps"], "set": settings | changes}


CELLS = {
    "long": cell(4),
    "short": cell(3),
    "seconds": cell(3) | {"budget": {"device_seconds": 1e-3}},
    "seldom": cell(2, validation={"every": 2}),
    "validated": cell(2, validation={"limit": 2}),
    "never": cell(2, validation=None),
    "other": cell(3, rollout={"group_size": 6}),
    "window/long": cell(18, "mix_grpo", method={"interval": None}),
    "window/short": cell(12, "mix_grpo", method={"interval": None}),
}


def resolved(smoke_assets: Path) -> dict[str, ResolvedCell]:
    profile = validate(Profile, small_profile_data(smoke_assets), "smoke")
    table = {"title": "A table", "columns": ["hps"]}
    experiment = validate(Experiment, {"name": "t", "cells": CELLS, "table": table}, "test")
    return {one.key: one for one in expand(experiment, profile, (1,))}


def trained(smoke_assets: Path, folder: Path, *keys: str) -> dict[str, Path]:
    """Trains cells one after the other; the run folders by key."""
    cells = resolved(smoke_assets)
    stages = {key: Train(Layout(folder, folder), cells[key]) for key in keys}
    for stage in stages.values():
        stage.run()
    return {key: stage.folder for key, stage in stages.items()}


def trained_folder(smoke_assets: Path, folder: Path, key: str) -> Path:
    return Layout(folder, folder).training(resolved(smoke_assets)[key])


def begun_from(run: Path) -> dict[str, Any] | None:
    manifest = read_trained(run)
    assert manifest is not None
    return manifest.get("begun_from")


@pytest.fixture(scope="module")
def together(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("together")
    return trained(smoke_assets, folder, "long", "short", "seconds")


def test_a_shorter_run_takes_all_but_its_last_iteration(
    smoke_assets: Path, tmp_path: Path, together: dict[str, Path]
) -> None:
    run, source = together["short"], together["long"]
    assert begun_from(run) == {"run": source.name, "iteration": 2}
    assert not checkpoint_folder(run, 1).exists()
    alone = trained(smoke_assets, tmp_path, "short")["short"]
    assert begun_from(alone) is None
    ours, theirs = weights(run), weights(alone)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows, whole, own = (read_metrics(one / METRICS_FILE) for one in (run, source, alone))
    assert rows[:3] == whole[:3]
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert [row.keys() for row in rows] == [row.keys() for row in own]


def test_runs_validated_on_other_prompts_share_nothing(
    smoke_assets: Path, together: dict[str, Path]
) -> None:
    folder = together["long"].parent
    for key, begins in (("validated", False), ("never", False), ("seldom", True)):
        # One folder, as validation is not part of a run's name.
        shutil.rmtree(trained_folder(smoke_assets, folder, key), ignore_errors=True)
        run = trained(smoke_assets, folder, key)[key]
        assert (begun_from(run) is not None) == begins, key
    rows = read_metrics(run / METRICS_FILE)
    assert rows[:2] == read_metrics(together["long"] / METRICS_FILE)[:2]
    (run / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"were validated otherwise \(file .*, limit 4, seed"):
        trained(smoke_assets, folder, "validated")
    trained(smoke_assets, folder, "never")
    trained(smoke_assets, folder, "seldom")


def test_a_run_that_ends_in_time_takes_what_cost_less(together: dict[str, Path]) -> None:
    # The first iteration takes longer than the budget, so nothing that was trained fits in it.
    assert begun_from(together["seconds"]) is None
    assert [row["iteration"] for row in read_metrics(together["seconds"] / METRICS_FILE)] == [0, 1]


def test_only_the_length_may_differ(smoke_assets: Path) -> None:
    hashes = {
        key: without_length(train_inputs(one.train))
        for key, one in resolved(smoke_assets).items()
        if one.train is not None
    }
    assert hashes["long"] == hashes["short"] == hashes["seconds"]
    # A twelfth of the iterations: the window moves every second iteration, or every one.
    names = ("long", "other", "window/long", "window/short")
    assert len({hashes[name] for name in names}) == len(names)
