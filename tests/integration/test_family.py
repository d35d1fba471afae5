"""Every method of the experiment ``family``: on the path of ``flux``, and timed."""

import json
from pathlib import Path

import pytest
from training_runs import trainer_for
from two_ranks import on_two_ranks

from benchmarks.speed.methods import main, report
from g2rpo.methods.presets import method_label, preset_names
from g2rpo.training.config import PromptsConfig, TrainConfig
from reproduce.experiment.cells import load_experiment
from reproduce.experiment.profile import load_profile
from reproduce.experiment.resolving import resolve

CELLS = [key for key, cell in load_experiment("family").cells.items() if cell.method is not None]


def config_of(assets: Path, key: str) -> TrainConfig:
    cell = resolve(load_experiment("family"), load_profile("flux-tiny"), key, 1)
    assert cell.train is not None
    policy = cell.train.policy.model_copy(update={"source": str(assets / "policy")})
    prompts = PromptsConfig(file=str(assets / "prompts" / "train.txt"))
    changes = {"policy": policy, "prompts": prompts, "validation": None, "pictures": None}
    return cell.train.model_copy(update=changes)


def train_each(assets: Path, folder: Path) -> None:
    found = {}
    for key in CELLS:
        trainer = trainer_for(config_of(assets, key), folder / key.replace("/", "-"))
        found[key] = trainer.iterate()
    if trainer.accelerator.is_main_process:
        (folder / "rows.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def rows(
    smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("family")
    assert on_two_ranks(train_each, smoke_assets, folder) == 0
    found: dict[str, dict[str, float]] = json.loads((folder / "rows.json").read_text())
    return found


@pytest.mark.parametrize("key", CELLS)
def test_a_method_trains_for_an_iteration(rows: dict[str, dict[str, float]], key: str) -> None:
    row = rows[key]
    assert row["gradient_norm"] > 0
    assert row["training_backwards"] > 0
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
