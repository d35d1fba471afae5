"""BranchGRPO trains: on two ranks as on one, pruned, and with every kind of update."""

import json
from pathlib import Path
from typing import Any

import pytest
from engine_runs import config_for
from training_runs import trainer_for
from two_ranks import on_two_ranks

from g2rpo.training.config import TrainConfig

METHOD: dict[str, Any] = {
    "name": "branch_grpo", "split_steps": [0, 2], "split_noise_scale": 4.0, "trained_leaves": 0.5,
}  # fmt: skip


def branch_config(assets: Path, **changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "method": METHOD,
        # In float64 the order of sums, which differs, hardly matters.
        "policy": {"dtype": "float64"},
        # With this seed the first update has 6 transitions of one prompt and 8 of the other.
        "rollout": {"group_size": 4, "prompts_per_iteration": 2},
        "seed": 1,
        "optimization": {"updates_per_iteration": 2},
        "advantage": {"whiten": True, "normalizer": "global_std"},
    }
    return config_for(assets, **{**defaults, **changes})


def rows(assets: Path, run: Path) -> tuple[list[dict[str, float]], int]:
    """The metrics of two iterations that do not depend on time, and the rank."""
    trainer = trainer_for(branch_config(assets), run)
    found = [trainer.iterate() for _ in range(2)]
    names = ("loss", "gradient_norm", "ratio_deviation", "training_backwards", "clipped_fraction")
    kept = [
        {key: value for key, value in row.items() if key in names or key.startswith("reward/")}
        for row in found
    ]
    return kept, trainer.accelerator.process_index


def write_rows(assets: Path, folder: Path) -> None:
    found, rank = rows(assets, folder / "run")
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_two_ranks_train_as_one_does(smoke_assets: Path, tmp_path: Path) -> None:
    assert on_two_ranks(write_rows, smoke_assets, tmp_path) == 0
    two = json.loads((tmp_path / "0.json").read_text())
    alone, _ = rows(smoke_assets, tmp_path / "alone")
    for found, expected in zip(two, alone, strict=True):
        assert found["ratio_deviation"] < 1e-12
        assert found.pop("ratio_deviation") == pytest.approx(expected.pop("ratio_deviation"))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("method", "optimization", "backwards"),
    [
        # Sources by step: 1, 2, 2, 4, 4, of the last two only 2; by default 1, 2, 4, 4, 4.
        (METHOD, {}, 1 + 2 + 2 + 2 + 2),
        (METHOD, {"update_every": "timestep"}, 1 + 2 + 2 + 2 + 2),
        ({"name": "branch_grpo", "pruned_depths": [2, 5]}, {}, 1 + 4 + 4),
    ],
)
def test_every_kind_of_update_trains_what_it_should(
    method: dict[str, Any],
    optimization: dict[str, Any],
    backwards: int,
    smoke_assets: Path,
    tmp_path: Path,
) -> None:
    config = branch_config(smoke_assets, method=method, optimization=optimization)
    row = trainer_for(config, tmp_path).iterate()
    assert row["training_backwards"] == 2 * backwards
    assert row["ratio_deviation"] < 1e-12
