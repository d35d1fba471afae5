"""Training from outside: killed and resumed, and with what must stop it."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from command_line import write_small_profile
from forked import Command
from training_runs import Brightness, config_for, trainer_for, weights
from typer.testing import CliRunner

from g2rpo.data.prompts import prompts_of_iteration, read_prompts
from g2rpo.errors import UserError
from g2rpo.methods.presets import load_preset, preset_names
from g2rpo.training.checkpoint.folder import (
    checkpoint_folder,
    latest_checkpoint,
    saved_iterations,
)
from g2rpo.training.forward import ForwardObjective
from g2rpo.training.metrics import read_metrics
from reproduce.cli import app

ITERATIONS = 4
GROUPS = {"branch_grpo": 8} | dict.fromkeys(("awm", "dgpo", "diffusion_nft"), 12)
"""Group sizes of the methods that need others than 6."""
ROUNDS = dict.fromkeys(("branch_grpo", "g2rpo", "tempflow_grpo"), (12, 2e-2))
ROUNDS |= dict.fromkeys(("awm", "dgpo", "diffusion_nft"), (36, 2e-2))
"""Rounds and learning rates of the methods that need fewer or more than the others."""


def train_command(profile: Path, results: Path) -> list[str]:
    return [
        "train", "table1", "hps/dance_grpo", "--profile", str(profile), "--results", str(results),
        "-s", f"optimization.iterations={ITERATIONS}", "-s", "execution.device=cpu",
    ]  # fmt: skip


def trained(profile: Path, results: Path) -> Path:
    done = CliRunner().invoke(app, train_command(profile, results), catch_exceptions=False)
    assert done.exit_code == 0
    (folder,) = (results / "runs").glob("dance_grpo-*")
    return folder


def test_killed_and_resumed_ends_bit_identical(smoke_assets: Path, tmp_path: Path) -> None:
    profile = write_small_profile(tmp_path / "small.yaml", smoke_assets)
    undisturbed = trained(profile, tmp_path / "undisturbed")

    after = random.Random().randint(1, ITERATIONS - 1)
    killed = tmp_path / "killed"
    command = Command(tmp_path, *train_command(profile, killed))
    while command.process.is_alive():
        logs = list(killed.glob("runs/dance_grpo-*/metrics.jsonl"))
        if logs and max((r["iteration"] for r in read_metrics(logs[0])), default=0) >= after:
            break
        time.sleep(0.01)
    command.kill()

    run = trained(profile, killed)

    assert run.name == undisturbed.name
    resumed, whole = weights(run), weights(undisturbed)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole), f"killed after {after}"
    rows = [row["iteration"] for row in read_metrics(run / "metrics.jsonl")]
    assert rows == list(range(ITERATIONS + 1)), f"killed after {after}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stops_and_names_it(
    smoke_assets: Path, tmp_path: Path, value: float
) -> None:
    config = config_for(smoke_assets)
    doomed = prompts_of_iteration(
        read_prompts(Path(config.prompts.file)), 2, config.seed, iteration=1
    )[0].text

    def spoil(scores: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        bad = torch.tensor([prompt == doomed for prompt in prompts])
        return torch.where(bad, torch.tensor(value), scores)

    with pytest.raises(UserError) as caught:
        trainer_for(config, tmp_path, Brightness(spoil)).train()
    message = str(caught.value)
    assert "iteration 2" in message
    assert "hps" in message
    assert repr(doomed) in message
    assert "\n" not in message
    assert saved_iterations(tmp_path) == [1]
    assert latest_checkpoint(tmp_path) is not None


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    smoke_assets: Path, tmp_path: Path
) -> None:
    config = config_for(smoke_assets)
    trainer = trainer_for(config, tmp_path)
    trainer.iterate()
    trainer.save()
    parameter = next(trainer.policy.transformer.parameters())
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    before = [p.detach().clone() for p in trainer.policy.transformer.parameters()]
    with pytest.raises(UserError, match=r"iteration 2: the gradient is not finite.*hps"):
        trainer.iterate()
    after = trainer.policy.transformer.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 1)


def test_a_perturbed_anchor_trips_the_ratio_check(
    smoke_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(config_for(smoke_assets), tmp_path)
    rollout = trainer.engine.run

    def perturbed(*arguments: object) -> object:
        result = rollout(*arguments)  # type: ignore[arg-type]
        result.recorded[0].sources.mul_(1.01)
        return result

    monkeypatch.setattr(type(trainer.engine), "run", lambda self, *a: perturbed(*a))
    before = [p.detach().clone() for p in trainer.policy.transformer.parameters()]
    with pytest.raises(UserError, match="importance ratio before the first update"):
        trainer.iterate()
    after = trainer.policy.transformer.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", preset_names())
def test_training_raises_the_reward_it_trains_on(
    smoke_assets: Path, tmp_path: Path, method: str
) -> None:
    """Not only plumbing: a few iterations move a simple reward up on other prompts and noise."""
    preset = load_preset(method, "matched")
    rounds, rate = ROUNDS.get(method, (28, 2e-2))
    settings = {"iterations": rounds, "learning_rate": rate, **preset.pop("optimization", {})}
    config = config_for(
        smoke_assets,
        **preset,
        grid={"steps": 6},
        rollout={"group_size": GROUPS.get(method, 6), "prompts_per_iteration": 4},
        optimization=settings,
        validation={
            "file": str(smoke_assets / "prompts" / "test.txt"),
            "limit": 16,
            "every": rounds,
        },
    )
    trainer = trainer_for(config, tmp_path)
    before = trainer.validate()["validation/hps"]
    first, *_ = [trainer.iterate() for _ in range(rounds)]
    # A random policy's images are no data of its own flow, which objectives on the forward process
    # build on: they learn more slowly here than on a trained policy.
    gain = 0.008 if isinstance(config.objective, ForwardObjective) else 0.02
    assert trainer.validate()["validation/hps"] > before + gain
    assert first["ratio_deviation"] < 2e-6
    assert first["clipped_fraction"] == 0.0


def test_a_budget_of_device_seconds_ends_a_run_as_a_finished_one(
    smoke_assets: Path, tmp_path: Path
) -> None:
    settings = {"iterations": 50, "learning_rate": 1e-3, "max_device_seconds": 1e-6}
    validation = {
        "file": str(smoke_assets / "prompts" / "validation.txt"), "limit": 2, "every": 10,
    }  # fmt: skip
    checkpoints = {"every": 40}
    config = config_for(
        smoke_assets, optimization=settings, validation=validation, checkpoints=checkpoints
    )
    trainer = trainer_for(config, tmp_path / "run")
    assert trainer.expected_iterations == 50
    progress = trainer.train()
    assert progress.iteration == 1 == trainer.expected_iterations
    assert saved_iterations(tmp_path / "run") == [1]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in rows if "validation/hps" in row] == [0, 1]
    again = trainer_for(config, tmp_path / "run")
    assert again.finished
    assert again.train() == progress
    unlimited = config.model_copy(
        update={"optimization": config.optimization.model_copy(update={"max_device_seconds": None})}
    )
    assert "max_device_seconds" not in unlimited.optimization.model_dump(mode="json")
