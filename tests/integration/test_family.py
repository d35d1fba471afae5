"""Every method on the paths of ``flux`` and ``sd35``, as released on SD3.5, and timed."""

import json
from pathlib import Path

import pytest
from training_runs import trainer_for
from two_ranks import on_two_ranks

from benchmarks.speed.methods import main, report
from g2rpo.methods.presets import load_preset, method_label, preset_names
from g2rpo.training.config import PromptsConfig, TrainConfig
from reproduce.experiment.cells import load_experiment
from reproduce.experiment.profile import load_profile
from reproduce.experiment.resolving import resolve

SD3 = "StableDiffusion3Pipeline"
CELLS = [key for key, cell in load_experiment("family").cells.items() if cell.method is not None]


RELEASED = sorted(name for name in preset_names() if "lora" in load_preset(name, "released", SD3))
"""The methods whose code trains Stable Diffusion 3.5."""


def on_assets(config: TrainConfig | None, assets: Path) -> TrainConfig:
    """``config`` with the tiny models and prompts in ``assets``."""
    assert config is not None
    source = assets / Path(config.policy.source).name
    policy = config.policy.model_copy(update={"source": str(source)})
    prompts = PromptsConfig(file=str(assets / "prompts" / "train.txt"))
    changes = {"policy": policy, "prompts": prompts, "validation": None, "pictures": None}
    return config.model_copy(update=changes)


def train_each(assets: Path, folder: Path, profile: str) -> None:
    found = {}
    for key in CELLS:
        cell = resolve(load_experiment("family"), load_profile(profile), key, 1)
        trainer = trainer_for(on_assets(cell.train, assets), folder / key.replace("/", "-"))
        found[key] = trainer.iterate()
    if trainer.accelerator.is_main_process:
        (folder / "rows.json").write_text(json.dumps(found))


@pytest.fixture(scope="module", params=["flux-tiny", "sd35-tiny"])
def rows(
    smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("family")
    assert on_two_ranks(train_each, smoke_assets, folder, request.param) == 0
    found: dict[str, dict[str, float]] = json.loads((folder / "rows.json").read_text())
    return found


@pytest.mark.parametrize("key", CELLS)
def test_a_method_trains_for_an_iteration(rows: dict[str, dict[str, float]], key: str) -> None:
    row = rows[key]
    assert row["gradient_norm"] > 0
    assert row["training_backwards"] > 0
    assert row["ratio_deviation"] <= 2e-5


@pytest.mark.parametrize("method", RELEASED)
def test_a_method_released_on_sd35_trains_for_an_iteration(
    smoke_assets: Path, tmp_path: Path, method: str
) -> None:
    experiment = load_experiment("family")
    cell = experiment.cells["hps/g2rpo"].model_copy(update={"method": method})
    released = experiment.model_copy(update={"preset": "released", "cells": {"cell": cell}})
    few = {"rollout": {"group_size": 4, "prompts_per_iteration": 2}}
    resolved = resolve(released, load_profile("sd35-smoke"), "cell", 1, few)
    trainer = trainer_for(on_assets(resolved.train, smoke_assets), tmp_path)
    assert trainer.policy.has_lora
    row = trainer.iterate()
    assert row["gradient_norm"] > 0
    assert row["ratio_deviation"] <= 2e-5


def test_every_method_is_timed(tmp_path: Path) -> None:
    main("tiny", "cpu", 1, tmp_path)
    result = json.loads((tmp_path / "methods-tiny.json").read_text())
    assert [m["label"] for m in result["methods"]] == [method_label(n) for n in preset_names()]
    for method in result["methods"]:
        parts = method["seconds/sampling"] + method["seconds/training"]
        assert 0 < parts < method["device_seconds"]
    page = (tmp_path / "methods-tiny.md").read_text()
    assert page.count("\n| ") == len(preset_names()) + 2


def test_the_page_shows_a_method_that_costs_twice_its_evaluations() -> None:
    plain = {
        "rollout_evaluations": 100, "training_forwards": 10, "training_backwards": 10,
        "images_scored": 5, "device_seconds": 3.0, "seconds/sampling": 1.0, "seconds/training": 0.6,
    }  # fmt: skip
    methods = [plain | {"label": key} for key in ("a", "b", "slow")]
    methods[2] |= {"seconds/sampling": 2.0}
    page = report({"size": "p", "device": "cpu", "threads": 1, "repeats": 1, "methods": methods})
    (row,) = [line for line in page.splitlines() if line.startswith("| slow")]
    assert row.endswith("| 2.00 | 1.00 |")
    assert "(10.00 and 20.00 ms)" in page
