"""Whole runs with the newer objectives: resumed, on two ranks, short of memory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import (
    GUIDED,
    config_for,
    exhausted_memory,
    guided,
    relative,
    run_to,
    trained_weights,
)
from training_runs import trainer_for
from two_ranks import on_two_ranks

from g2rpo.errors import UserError
from g2rpo.policy.size import read_size
from g2rpo.training.batch import NoisedBatch, training_batch
from g2rpo.training.checkpoint.folder import checkpoint_folder
from g2rpo.training.config import TrainConfig
from g2rpo.training.memory import gpu_bytes
from reproduce.jobs.estimates import checkpoint_disk

OBJECTIVES: dict[str, dict[str, Any]] = {
    "nft": {"name": "nft", "old": {"slope": 0.3, "limit": 0.9}},
    "awm": {"name": "awm", "times": {"count": 2}, "old": {"slope": 0.3, "limit": 0.9}},
    "dgpo": {
        "name": "dgpo",
        "times": {"count": 2, "until": 1.0},
        "old": {"slope": 0.3, "limit": 0.9, "rollouts_after": 1},
    },
}


def config_of(assets: Path, name: str, guidance: str | None = None, **changes: Any) -> TrainConfig:
    changes = changes if guidance is None else guided(assets, guidance, **changes)
    return config_for(
        assets,
        method={"name": "ode"},
        objective=OBJECTIVES[name],
        optimization={"clip_range": 0.01, "kl_coefficient": 0.1},
        **changes,
    )


@pytest.mark.parametrize(
    ("name", "guidance"), [*((name, None) for name in OBJECTIVES), ("dgpo", "rollouts alone")]
)
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_a_run_resumes_bit_for_bit_with_its_old_policy(
    smoke_assets: Path,
    tmp_path: Path,
    name: str,
    guidance: str | None,
    lora: dict[str, Any] | None,
) -> None:
    config = config_of(smoke_assets, name, guidance, lora=lora)
    trainer = trainer_for(config, tmp_path / "run")
    run_to(trainer, 2)
    resumed = trainer_for(config, tmp_path / "run")
    for one in (trainer, resumed):
        one.iterate()
    weights = [trained_weights(one) for one in (trainer, resumed)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert trainer.old is not None and resumed.old is not None
    for mine, theirs in zip(trainer.old.parameters, resumed.old.parameters, strict=True):
        assert torch.equal(mine, theirs)
    assert any(
        not torch.equal(mine, new)
        for mine, new in zip(trainer.old.parameters, trainer.weights.parameters, strict=True)
    )
    saved = {path.name for path in checkpoint_folder(tmp_path / "run", 2).iterdir()}
    assert "old_policy.safetensors" in saved


Case = tuple[str, str | None]
"""An objective, and the guidance of a Stable Diffusion 3; None is a FLUX."""


CASES: list[tuple[Case, str]] = [
    (("nft", None), "replicated"),
    (("nft", None), "fsdp2"),
    (("awm", None), "replicated"),
    (("dgpo", None), "fsdp2"),
    (("dgpo", "rollouts alone"), "replicated"),
    (("nft", "detached"), "fsdp2"),
]


def write_trained(assets: Path, folder: Path) -> None:
    """Trains every case on the ranks, and saves each one's weights and counters."""
    for number, (case, sharding) in enumerate(CASES):
        changes = {"policy": {"dtype": "float64"}, "execution": {"sharding": sharding}}
        trainer = trainer_for(config_of(assets, *case, **changes), folder / f"run-{number}")
        for _ in range(3):
            trainer.iterate()
        weights = trained_weights(trainer)
        if trainer.accelerator.is_main_process:
            torch.save(weights, folder / f"{number}.pt")
            counters = replace(trainer.progress, device_seconds=0)
            (folder / f"{number}.json").write_text(json.dumps(vars(counters)))


@pytest.fixture(scope="module")
def two_ranks(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-ranks")
    assert on_two_ranks(write_trained, smoke_assets, folder) == 0
    return folder


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_ranks_train_as_one_does(
    smoke_assets: Path, tmp_path: Path, two_ranks: Path, number: int
) -> None:
    case, _ = CASES[number]
    alone = trainer_for(config_of(smoke_assets, *case, policy={"dtype": "float64"}), tmp_path)
    start = trained_weights(alone)
    for _ in range(3):
        alone.iterate()
    both = torch.load(two_ranks / f"{number}.pt", weights_only=True)
    assert relative(both, trained_weights(alone), start) < 1e-6
    counters = json.loads((two_ranks / f"{number}.json").read_text())
    assert counters == vars(replace(alone.progress, device_seconds=0))


@pytest.mark.parametrize(
    ("name", "guidance"),
    [*((name, None) for name in OBJECTIVES), *(("dgpo", guidance) for guidance in GUIDED)],
)
def test_short_memory_halves_the_micro_batch_and_changes_nothing_else(
    smoke_assets: Path, tmp_path: Path, name: str, guidance: str | None
) -> None:
    """Also where a micro-batch no longer holds the images of a group that are compared."""
    changes = {"policy": {"dtype": "float64"}, "execution": {"training_micro_batch": 8}}
    config = config_of(smoke_assets, name, guidance, **changes)
    plenty, short = (trainer_for(config, tmp_path / run) for run in ("plenty", "short"))
    start = trained_weights(plenty)
    plenty.iterate()
    with exhausted_memory(short.updater.policy, 2) as asked:
        row = short.iterate()
    assert max(asked) > 2 and row["training_micro_batch"] == 2
    assert relative(trained_weights(short), trained_weights(plenty), start) < 1e-6


def test_images_of_the_same_key_are_noised_alike(smoke_assets: Path, tmp_path: Path) -> None:
    trainer = trainer_for(config_of(smoke_assets, "dgpo"), tmp_path)
    prompts = trainer.local_prompts()
    rollout = trainer.rollout(prompts)
    batch = training_batch(rollout, prompts, trainer.config)
    assert isinstance(batch, NoisedBatch)
    size, slots = trainer.config.rollout.group_size, 2
    assert len(batch) == len(prompts) * slots * size
    times = batch.times.view(len(prompts), slots, size)
    assert (times == times[:1, :, :1]).all()  # shared by the iteration
    for row in range(len(batch)):
        prompt, sample = int(batch.prompts[row]), int(batch.samples[row])
        image = rollout.tree.images.index(rollout.tree.groups[0].images[sample])
        clean, time = rollout.latents[prompt, image], float(batch.times[row])
        noise = batch.target[row] + clean
        torch.testing.assert_close(batch.states[row], (1 - time) * clean + time * noise)
        first = row - sample  # the first image of the group at this time has the same noise
        own = batch.target[first] + rollout.latents[prompt, 0]
        torch.testing.assert_close(noise, own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"name": "clipped"}}, "method.name=ode has none"),
        ({"optimization": {"update_every": "timestep"}}, "update_every: iteration"),
        ({"optimization": {"updates_per_iteration": 3}}, "a whole group"),
        ({"objective": OBJECTIVES["dgpo"] | {"old": None}}, "leave out objective.old"),
        ({"advantage": {"granularity_reduction": "mean"}}, "no effect with objective.name=dgpo"),
        (
            {
                "method": {"name": "branch_grpo", "pruned_depths": [3, 4, 5, 6]},
                "grid": {"steps": 6},
                "rollout": {"group_size": 8},
            },
            r"records none; .*method\.pruned_depths",
        ),
        (
            {
                "method": {
                    "name": "g2rpo",
                    "stochastic_steps": "all",
                    "adaptive_steps": {"count": 2},
                }
            },
            "method.adaptive_steps needs",
        ),
        (
            {
                "method": {"name": "branch_grpo", "trained_leaves": 0.5},
                "rollout": {"group_size": 4},
            },
            r"method\.trained_leaves=null",
        ),
        ({"method": {"name": "tempflow_grpo", "weight_scale": 2.0}}, r"method\.weight_scale=null"),
        (
            {"objective": OBJECTIVES["nft"], "advantage": {"clip": 1e9}},
            "advantage.clip=1e.09, which",
        ),
        ({"objective": {"name": "awm"}, "advantage": {"clip": 101}}, "at most 100, e.g. 5"),
        ({"method": {"name": "ode", "eta": 0.5}}, "method.eta has no effect: ode has no noise"),
        ({"method": {"name": "ode", "kernel": "cps"}}, "method.kernel has no effect"),
    ],
)
def test_impossible_combinations_are_refused(
    smoke_assets: Path, changes: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = {"method": {"name": "ode"}, "objective": OBJECTIVES["dgpo"]}
    with pytest.raises(ValueError, match=message):
        config_for(smoke_assets, **(settings | changes))


def test_an_old_policy_that_nothing_uses_is_not_kept(smoke_assets: Path, tmp_path: Path) -> None:
    def config(**changes: Any) -> TrainConfig:
        objective = {"name": "awm", "average_weight": 0.0, "times": {"count": 2}} | changes
        return config_for(smoke_assets, method={"name": "ode"}, objective=objective)

    unused, used = config(), config(old={"rollouts_after": 0})
    trainer = trainer_for(unused, tmp_path)
    assert trainer.old is None
    trainer.iterate()
    # A rollout needs it even if the loss does not.
    assert used.frozen_policies == () and used.old_policy is not None
    size = read_size(smoke_assets / "policy")
    assert "old policy" not in gpu_bytes(unused, size, 1)
    assert gpu_bytes(used, size, 1)["old policy"] == 4 * size.parameters
    assert checkpoint_disk(used)[0] - checkpoint_disk(unused)[0] == 4 * size.parameters


@pytest.mark.parametrize(
    ("optimization", "states"),
    [
        # Per prompt one state at the first step, where the group is one state, and 3 at each other.
        ({}, 4 * (1 + 3 * 3)),
        ({"updates_per_iteration": 3}, 4 * 4),
        ({"update_every": "timestep"}, 4 * 3),
    ],
)
def test_guard_refuses_a_micro_batch_that_parts_an_update_before_a_rollout(
    smoke_assets: Path, tmp_path: Path, optimization: dict[str, Any], states: int
) -> None:
    def config(size: int) -> TrainConfig:
        return config_for(
            smoke_assets,
            method={"name": "flow_grpo"},
            grid={"steps": 5},
            objective={"name": "guard", "published": "flow_grpo"},
            optimization=optimization,
            execution={"training_micro_batch": size},
        )

    with pytest.raises(UserError, match=rf"over the {states} states .*raise it to {states},"):
        trainer_for(config(states - 1), tmp_path)
    trainer_for(config(states), tmp_path).iterate()
