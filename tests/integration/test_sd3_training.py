"""RL iterations on a tiny Stable Diffusion 3."""

from pathlib import Path

import pytest
import torch
from tiny_sd3 import build_tiny_sd3
from training_runs import config_for, trainer_for

from g2rpo.training.config import TrainConfig

METHODS = {
    "g2rpo": {"name": "g2rpo", "granularities": [1, 2], "stochastic_steps": [0, 1]},
    "flow_grpo": {"name": "flow_grpo"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sd3(tmp_path_factory.mktemp("sd3") / "pipeline")


def sd3_config(folder: Path, method: str, **changes: object) -> TrainConfig:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red circle\ntwo green triangles\na blue square\n")
    policy = {"source": str(folder), "resolution": 32, "max_sequence_length": 16}
    data = {
        "policy": policy | {"guidance_scale": 1.0},
        "prompts": {"file": str(prompts)},
        "grid": {"steps": 5},
        "method": METHODS[method],
        "optimization": {"iterations": 2, "learning_rate": 1e-3},
    }
    return config_for(folder, **data | changes)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_iterations(folder: Path, tmp_path: Path, method: str, *, adapters: bool) -> None:
    lora = {"rank": 2, "alpha": 4} if adapters else None
    trainer = trainer_for(sd3_config(folder, method, lora=lora), tmp_path / "run")
    before = [parameter.detach().clone() for parameter in trainer.weights.parameters]
    rows = [trainer.iterate() for _ in range(2)]
    assert all(row["ratio_deviation"] <= 1e-5 and row["gradient_norm"] > 0 for row in rows)
    moved = [
        not torch.equal(old, new)
        for old, new in zip(before, trainer.weights.parameters, strict=True)
    ]
    assert sum(moved) > len(moved) / 2
