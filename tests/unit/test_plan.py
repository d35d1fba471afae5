"""Plans: which stages there are, which are done, what is told of them, and how fast."""

import time
from pathlib import Path
from typing import Any

import pytest
import small_plan
import yaml

from reproduce.checks.scale import needs_by_kind
from reproduce.commands.plan_display import KINDS, print_plan, stage_estimates
from reproduce.experiment import Profile, expand, load_experiment, load_profile
from reproduce.experiment.fingerprint import absent_inputs_named
from reproduce.experiment.layout import Layout
from reproduce.jobs.plan import Plan, make_plan
from reproduce.stages.cells import Score
from reproduce.stages.training import Train
from slurm.cluster import load_cluster

CELLS: dict[str, Any] = {
    **small_plan.CELLS,
    "hps/same": {"method": "g2rpo", "train": ["hps"]},
    "hps/b": {"method": "mix_grpo", "train": ["hps"]},
}


def plan_of(folder: Path, shares: int = 1, seeds: tuple[int, ...] = (1,)) -> Plan:
    return small_plan.small_plan(folder, shares, seeds, CELLS)


def kinds(plan: Plan) -> dict[str, int]:
    found: dict[str, int] = {}
    for stage in plan.graph.stages.values():
        found[stage.kind] = found.get(stage.kind, 0) + 1
    return found


def test_stages_that_cells_share_are_there_once(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, seeds=(1, 2))
    assert len(plan.cells) == 7
    # The same training under two rows is one run.
    assert kinds(plan) == {"embed": 1, "train": 4, "sample": 5, "score": 5, "render": 1}
    assert list(plan.graph.stages)[-1].startswith("render/")


def test_shares_are_arrays_that_wait_for_all_of_the_step_before(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, shares=3)
    assert kinds(plan) == {"embed": 1, "train": 2, "sample": 9, "score": 9, "render": 1}
    scores = [stage for stage in plan.graph.stages.values() if stage.kind == "score"]
    for stage in scores:
        assert len(stage.needs) == 3
        assert {plan.graph[name].kind for name in stage.needs} == {"sample"}
        assert stage.array is not None and stage.name.startswith(stage.array)
    (render,) = (stage for stage in plan.graph.stages.values() if stage.kind == "render")
    assert set(render.after) == {stage.name for stage in scores}


def test_what_is_done_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan_of(tmp_path)
    trained = next(cell for cell in first.cells if cell.key == "hps/a")
    name = first.layout.training(trained).name
    monkeypatch.setattr(Train, "is_recorded", lambda _: True)
    monkeypatch.setattr(
        Train, "is_done", lambda stage: stage.cell.train is None or stage.folder.name == name
    )
    plan = plan_of(tmp_path)
    assert plan.done == {f"train/{name}"}
    assert len(plan.todo) == len(first.todo) - 1
    monkeypatch.setattr(Score, "is_done", lambda stage: stage.training.folder.name == name)
    plan = plan_of(tmp_path)
    # The images of a cell that is scored are not needed any more.
    assert {done.split("/")[0] for done in plan.done} == {"train", "sample", "score"}
    assert all(done.split("/")[1] == name for done in plan.done)
    monkeypatch.setattr(Score, "is_done", lambda _: True)
    plan = plan_of(tmp_path)
    assert len(plan.todo) == 0
    assert len(plan.done) == len(plan.graph) - 1


def test_only_some_stages_and_the_table(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    training = next(name for name in plan.graph.stages if name.startswith("train/"))
    chosen = plan.only(plan.graph.downstream([training]))
    assert [stage.kind for stage in chosen.todo.stages.values()] == [
        "train", "sample", "score", "render",
    ]  # fmt: skip
    assert chosen.todo[training].needs == ()


def test_the_local_prediction_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    print_plan(plan_of(tmp_path), load_cluster("local"))
    text = capsys.readouterr().out
    assert "t, profile mini: 4 cells, on this machine" in text
    assert "wall time: about " in text and " at a time" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert rows["train"][1:4] == ["2", "0", "2"]
    assert rows["in"][2:5] == ["10", "0", "10"]
    print_plan(plan_of(tmp_path), load_cluster("slurm"), everything=True)
    text = capsys.readouterr().out
    assert "if every job starts at once" in text
    assert sum(line.startswith("sample ") for line in text.splitlines()) == 3 + 1


def planned(rows: int, folder: Path) -> float:
    """Plans and prints an experiment of so many rows; returns the CPU seconds."""
    cells: dict[str, Any] = {"base": {}, "hps/a": CELLS["hps/a"]}
    for number in range(rows - 2):
        settings = {"optimization": {"learning_rate": 1e-5 * (1 + (number + 0.5) / 1000)}}
        cells[f"hps/c{number}"] = {"method": "g2rpo", "train": ["hps"], "set": settings}
    experiment, profile = small_plan.experiment_of(cells), load_profile("mini")
    started = time.process_time()
    resolved = expand(experiment, profile, (1,))
    plan = make_plan(experiment, profile, resolved, Layout(folder / "runs", folder / "runs"))
    print_plan(plan, load_cluster("local"))
    took = time.process_time() - started
    assert kinds(plan)["train"] == rows - 1
    return took


def test_planning_time_is_proportional_to_the_number_of_cells(tmp_path: Path) -> None:
    planned(10, tmp_path)  # fills caches
    few, many = planned(100, tmp_path), planned(1000, tmp_path)
    assert many < 40 * few  # 10 if linear; comparing all pairs would be 100


def test_the_paper_s_scale_is_planned_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile: Profile = load_profile("flux")
    changes = {split: str(tmp_path / f"{split}.txt") for split in ("train", "validation", "test")}
    prompts = profile.prompts.model_copy(update=changes)
    profile = profile.model_copy(update={"prompts": prompts})
    experiment = load_experiment("table1")
    with absent_inputs_named():
        cells = expand(experiment, profile, (1,))
        layout = Layout(tmp_path / "runs", tmp_path / "runs")
        plan = make_plan(experiment, profile, cells, layout)
        print_plan(plan, load_cluster("h100-apptainer"))
    text = capsys.readouterr().out
    missing = next(line for line in text.splitlines() if line.startswith("missing prompts"))
    assert "train.txt" in missing and "g2rpo prompts fetch" in missing
    assert "g2rpo weights fetch" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("train "))
    assert row[4:7] == ["2", "x", "8"]
    assert "2 x 8" in text and "GPU-hours" in text
    assert not plan.done


def test_every_kind_of_stage_has_a_time_limit_devices_and_an_estimate(tmp_path: Path) -> None:
    cluster, wanted = load_cluster("h100-apptainer"), needs_by_kind(load_profile("flux"))
    assert set(wanted) == set(KINDS)
    assert all(cluster.time_limit(kind) >= 1 for kind in KINDS)
    plan = plan_of(tmp_path)
    estimates = stage_estimates(plan)
    assert estimates.keys() == plan.graph.stages.keys()
    assert all(estimate.seconds > 0 for estimate in estimates.values())


def test_an_experiment_file_is_planned_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "t", "cells": CELLS, "table": small_plan.TABLE}))
    monkeypatch.chdir(tmp_path)
    plan = make_plan(
        load_experiment("mine.yaml"),
        load_profile("mini"),
        expand(load_experiment("mine.yaml"), load_profile("mini"), (1,)),
        Layout(Path("results/runs"), Path("results/runs")),
    )
    assert all(Path(stage.lease).is_absolute() for stage in plan.graph.stages.values())
    assert not (tmp_path / "results").exists()
