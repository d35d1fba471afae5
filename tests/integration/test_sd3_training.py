"""RL iterations on a tiny Stable Diffusion 3."""

from pathlib import Path

import pytest
import torch
from tiny_sd3 import build_tiny_sd3
from training_runs import config_for, trainer_for

from g2rpo.errors import UserError
from g2rpo.training.config import TrainConfig
from g2rpo.training.counts import training_counts

METHODS = {
    "g2rpo": {"name": "g2rpo", "granularities": [1, 2], "stochastic_steps": [0, 1]},
    "flow_grpo": {"name": "flow_grpo"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sd3(tmp_path_factory.mktemp("sd3") / "pipeline")


def sd3_config(folder: Path, method: str, guidance: float, **changes: object) -> TrainConfig:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red circle\ntwo green triangles\na blue square\n")
    policy = {"source": str(folder), "resolution": 32, "max_sequence_length": 16}
    data = {
        "policy": policy | {"guidance_scale": guidance},
        "prompts": {"file": str(prompts)},
        "grid": {"steps": 5},
        "method": METHODS[method],
        "optimization": {"iterations": 2, "learning_rate": 1e-3},
    }
    return config_for(folder, **data | changes)


@pytest.mark.parametrize(("guidance", "adapters"), [(1.0, False), (4.5, False), (4.5, True)])
@pytest.mark.parametrize("method", METHODS)
def test_iterations(
    folder: Path, tmp_path: Path, method: str, guidance: float, *, adapters: bool
) -> None:
    lora = {"rank": 2, "alpha": 4} if adapters else None
    trainer = trainer_for(sd3_config(folder, method, guidance, lora=lora), tmp_path / "run")
    before = [parameter.detach().clone() for parameter in trainer.weights.parameters]
    rows = [trainer.iterate() for _ in range(2)]
    assert all(row["ratio_deviation"] <= 1e-5 and row["gradient_norm"] > 0 for row in rows)
    moved = [
        not torch.equal(old, new)
        for old, new in zip(before, trainer.weights.parameters, strict=True)
    ]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("method", METHODS)
def test_a_guided_velocity_counts_twice(folder: Path, tmp_path: Path, method: str) -> None:
    counted = {}
    for guidance in (1.0, 4.5):
        penalty = {"iterations": 2, "kl_coefficient": 0.1}
        config = sd3_config(folder, method, guidance, optimization=penalty)
        trainer = trainer_for(config, tmp_path / str(guidance))
        counts, row = training_counts(config), [trainer.iterate() for _ in range(2)][-1]
        assert row["rollout_evaluations"] == counts.rollout_evaluations
        assert row["training_forwards"] == counts.training_forwards
        assert row["training_backwards"] == counts.training_backwards
        assert row["images_scored"] == counts.images_scored
        counted[guidance] = counts
    costs = [counted[guidance].equal_cost_evaluations for guidance in (1.0, 4.5)]
    assert costs[1] == pytest.approx(2 * costs[0], abs=1)


@pytest.mark.parametrize("approximation", [{"merged_lora": True}, {"fp8": True}])
def test_approximate_continuations(
    folder: Path, tmp_path: Path, approximation: dict[str, bool]
) -> None:
    config = sd3_config(
        folder, "g2rpo", 4.5, lora={"rank": 2, "alpha": 4}, approximate_rollout=approximation
    )
    row = trainer_for(config, tmp_path / "run").iterate()
    assert row["ratio_deviation"] <= 1e-5


def test_there_is_no_step_cache(folder: Path, tmp_path: Path) -> None:
    cached = {"step_cache": {"threshold": 0.1}}
    config = sd3_config(folder, "g2rpo", 1.0, approximate_rollout=cached)
    with pytest.raises(UserError, match="step_cache is not supported"):
        trainer_for(config, tmp_path / "run")
