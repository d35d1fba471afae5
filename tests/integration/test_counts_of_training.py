"""The counters of real, tiny training runs against the counts made before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import training_runs
from torch import Tensor
from training_runs import Brightness, drawn_states, trainer_for

from g2rpo.training.config import TrainConfig
from g2rpo.training.counts import training_counts, validations
from reproduce.jobs.estimates import checkpoint_disk, prompt_count

RUNS: dict[str, dict[str, Any]] = {
    "g2rpo": {
        "method": {"name": "g2rpo", "granularities": [1, 2], "stochastic_steps": [0, 2]},
        "optimization": {"update_every": "timestep"},
    },
    "g2rpo, two updates": {
        "method": {"name": "g2rpo", "granularities": [1], "log_anchor_reward": False},
        "optimization": {"updates_per_iteration": 2},
    },
    "mix_grpo": {
        "method": {"name": "mix_grpo", "window_size": 2, "interval": 1},
        "optimization": {"update_every": "timestep"},
    },
    "mix_grpo_flash": {
        "method": {"name": "mix_grpo", "window_size": 1, "interval": 1, "post_window_ratio": 0.9},
    },
    "dance_grpo": {"method": {"name": "dance_grpo"}, "optimization": {"updates_per_iteration": 2}},
    "branch_grpo": {
        "method": {"name": "branch_grpo", "pruned_depths": [5], "trained_leaves": 0.5},
        "optimization": {"updates_per_iteration": 2},
    },
    "flow_grpo, KL": {
        "method": {"name": "flow_grpo", "shared_initial_noise": False},
        "optimization": {"kl_coefficient": 0.1, "updates_per_iteration": 4, "ema_decay": 0.9},
    },
    "nft": {
        "method": {"name": "ode", "solver": "dpm2m"}, "objective": {"name": "nft"},
        "noised": 3 * 2 * 4 * 4,  # iterations, prompts, images, times
        "optimization": {"kl_coefficient": 0.1, "updates_per_iteration": 2},
    },
    "awm, two updates, images of g2rpo": {
        "method": {"name": "g2rpo", "granularities": [1, 2], "stochastic_steps": [0, 2]},
        "objective": {"name": "awm", "times": {"count": 1}}, "noised": 3 * 2 * (2 * 2 * 4) * 1,
        "optimization": {"updates_per_iteration": 2},
    },
    "nft, leaves of branch_grpo": {
        "method": {"name": "branch_grpo"}, "objective": {"name": "nft", "times": {"count": 2}},
        "noised": 3 * 2 * 4 * 2,
    },
    "dgpo in parts of groups": {
        "method": {"name": "ode"}, "objective": {"name": "dgpo", "times": {"count": 2}},
        "noised": 3 * 2 * 4 * 2,
    },
}  # fmt: skip


def config_for(assets: Path, run: dict[str, Any]) -> TrainConfig:
    return training_runs.config_for(
        assets,
        method=run["method"],
        objective=run.get("objective", {"name": "clipped"}),
        rollout={"group_size": 4, "prompts_per_iteration": 2},
        optimization={"iterations": 3, **run.get("optimization", {})},
        validation={
            "file": str(assets / "prompts" / "validation.txt"), "limit": 3, "every": 2,
        },
        execution={"device": "cpu", "trackers": [], "training_micro_batch": 3},
    )  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_costs_what_was_counted(name: str, smoke_assets: Path, tmp_path: Path) -> None:
    config = config_for(smoke_assets, RUNS[name])
    scored: list[int] = []

    def count(scores: Tensor, prompts: Sequence[str]) -> Tensor:
        scored.append(len(prompts))
        return scores

    progress = trainer_for(config, tmp_path, Brightness(count)).train()
    counts = training_counts(config)
    assert counts.rollout_evaluations == progress.rollout_evaluations
    assert counts.images_scored == progress.images_scored
    noised = RUNS[name].get("noised")
    trained = drawn_states(config) if noised is None else noised
    assert trained == progress.training_backwards
    shared = 12 if name == "dance_grpo" else 0  # states that any of several samples may train
    assert abs(counts.training_backwards - progress.training_backwards) <= shared
    assert abs(counts.training_forwards - progress.training_forwards) <= shared
    validation = config.validation
    assert validation is not None
    held_out = prompt_count(Path(validation.file))
    seen = min(validation.limit, held_out) * validations(validation, progress.iteration)
    assert sum(scored) == progress.images_scored + seen

    size, most, written = checkpoint_disk(config)
    assert (most, written) == (3, 3)  # two that are kept and the one being written
    files = [p for p in (tmp_path / "checkpoints" / "iteration-000003").rglob("*") if p.is_file()]
    # Beside the tensors there are their names.
    assert size <= sum(path.stat().st_size for path in files) < 1.1 * size
