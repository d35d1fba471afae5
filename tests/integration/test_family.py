"""Every method of the experiment ``family`` on the path of ``flux``: bfloat16, two sharded ranks."""

import json
from pathlib import Path

import pytest
from training_runs import trainer_for
from two_ranks import on_two_ranks

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
