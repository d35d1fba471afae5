"""Training from outside: killed and resumed, on two ranks, and with what must stop it."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from command_line import write_small_profile
from safetensors.torch import load_file
from training_runs import Brightness, config_for, distance, trainer_for, weights

from g2rpo.data.prompts import prompts_of_iteration, read_prompts
from g2rpo.errors import UserError
from g2rpo.training.checkpoint.folder import (
    checkpoint_folder,
    latest_checkpoint,
    saved_iterations,
)
from g2rpo.training.metrics import read_metrics

ITERATIONS = 5


@pytest.fixture(scope="session")
def small_profile(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke profile on the session's assets, without judges that are not trained on."""
    return write_small_profile(tmp_path_factory.mktemp("profile") / "small.yaml", smoke_assets)


def train_command(profile: Path, results: Path, *extra: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    return [
        *launcher, "reproduce.cli", "train", "table1", "hps/dance_grpo",
        "--profile", str(profile), "--results", str(results),
        "-s", f"optimization.iterations={ITERATIONS}", "-s", "execution.device=cpu", *extra,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_folder(results: Path) -> Path:
    (folder,) = (results / "runs").glob("dance_grpo-*")
    return folder


def trained(profile: Path, results: Path, *extra: str, ranks: int = 1) -> Path:
    subprocess.run(
        train_command(profile, results, *extra, ranks=ranks),
        check=True,
        env=environment(),
        timeout=600,
    )
    return run_folder(results)


@pytest.fixture(scope="session")
def undisturbed(small_profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(small_profile, tmp_path_factory.mktemp("undisturbed"))


def test_killed_and_resumed_ends_bit_identical(
    small_profile: Path, undisturbed: Path, tmp_path: Path
) -> None:
    after = random.Random().randint(1, ITERATIONS - 1)
    process = subprocess.Popen(train_command(small_profile, tmp_path), env=environment())
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        logs = list(tmp_path.glob("runs/dance_grpo-*/metrics.jsonl"))
        if logs and max((row["iteration"] for row in read_metrics(logs[0])), default=0) >= after:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()

    run = trained(small_profile, tmp_path)

    assert run.name == undisturbed.name
    resumed, whole = weights(run), weights(undisturbed)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole), f"killed after {after}"
    rows = [row["iteration"] for row in read_metrics(run / "metrics.jsonl")]
    assert rows == list(range(ITERATIONS + 1)), f"killed after {after}"


def assert_same_metrics(run: Path, other: Path) -> None:
    """The rewards and counts of two runs agree, iteration by iteration."""
    rows, others = read_metrics(run / "metrics.jsonl"), read_metrics(other / "metrics.jsonl")
    for one, two in zip(rows, others, strict=True):
        assert one.keys() == two.keys()
        for key in ("rollout_evaluations", "training_backwards", "images_scored"):
            assert one.get(key) == two.get(key)
        for key in one:
            if key.startswith(("reward/", "validation/")):
                assert two[key] == pytest.approx(one[key], abs=1e-3)


def test_two_ranks_train_as_one_does(
    small_profile: Path, smoke_assets: Path, tmp_path: Path
) -> None:
    # In float64: Adam turns the rounding of a tiny gradient into a step of the learning rate.
    double = yaml.safe_load(small_profile.read_text())
    double["policy"]["dtype"] = "float64"
    profile = tmp_path / "double.yaml"
    profile.write_text(yaml.safe_dump(double))
    start = load_file(
        smoke_assets / "policy" / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    run_of_one = trained(profile, tmp_path / "one")
    run_of_two = trained(profile, tmp_path / "two", ranks=2)
    one, two = weights(run_of_one), weights(run_of_two)
    moved = distance(one, start)
    assert moved > 0
    assert distance(two, one) / moved <= 1e-3
    assert_same_metrics(run_of_one, run_of_two)

    # The control: other prompts must not pass for the same training.
    shuffled = yaml.safe_load(profile.read_text())
    lines = Path(shuffled["prompts"]["train"]).read_text().splitlines()
    other = tmp_path / "shuffled.txt"
    other.write_text("\n".join(reversed(lines)) + "\n")
    shuffled["prompts"]["train"] = str(other)
    profile = tmp_path / "shuffled.yaml"
    profile.write_text(yaml.safe_dump(shuffled))
    control = weights(trained(profile, tmp_path / "control", ranks=2))
    assert distance(control, one) / moved > 1e-2


def test_ranks_share_the_prompts_of_an_iteration(smoke_assets: Path) -> None:
    prompts = read_prompts(smoke_assets / "prompts" / "train.txt")
    whole = prompts_of_iteration(prompts, 4, seed=1, iteration=2)
    assert whole[0::2] + whole[1::2] != []
    assert {p.id for p in whole[0::2]} | {p.id for p in whole[1::2]} == {p.id for p in whole}
    assert not {p.id for p in whole[0::2]} & {p.id for p in whole[1::2]}


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


@pytest.mark.parametrize("method", ["g2rpo", "dance_grpo", "mix_grpo", "flow_grpo"])
def test_ratio_before_the_first_update_is_one(
    smoke_assets: Path, tmp_path: Path, method: str
) -> None:
    config = config_for(smoke_assets, method={"name": method})
    row = trainer_for(config, tmp_path).iterate()
    assert row["ratio_deviation"] < 2e-6
    assert row["clipped_fraction"] == 0.0


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


def test_a_damaged_checkpoint_is_passed_over(smoke_assets: Path, tmp_path: Path) -> None:
    config = config_for(smoke_assets)
    trainer = trainer_for(config, tmp_path)
    trainer.train()
    assert saved_iterations(tmp_path) == [2, 3]
    newest = checkpoint_folder(tmp_path, 3) / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 2)
    again = trainer_for(config, tmp_path)
    assert again.progress.iteration == 2
    whole = {k: v.clone() for k, v in trainer.policy.transformer.state_dict().items()}
    again.train()
    for name, value in again.policy.transformer.state_dict().items():
        assert torch.equal(value, whole[name])


def test_ema_is_the_running_average_and_survives_resuming(
    smoke_assets: Path, tmp_path: Path
) -> None:
    settings = {"iterations": 3, "learning_rate": 1e-3, "ema_decay": 0.5}
    config = config_for(smoke_assets, optimization=settings)
    trainer = trainer_for(config, tmp_path / "run")
    trainer.iterate()
    trainer.save()
    resumed = trainer_for(config, tmp_path / "run")
    for one in (trainer, resumed):
        one.iterate()
    assert trainer.ema is not None
    assert resumed.ema is not None
    for a, b in zip(trainer.ema.shadow_params, resumed.ema.shadow_params, strict=True):
        assert torch.equal(a, b)
    current = dict(trainer.policy.transformer.named_parameters())
    shadow = trainer.ema.shadow_params
    assert any(
        not torch.equal(a, b.detach()) for a, b in zip(shadow, current.values(), strict=True)
    )
    trainer.save()
    folder = checkpoint_folder(tmp_path / "run", 2)
    saved = load_file(folder / "ema_transformer" / "diffusion_pytorch_model.safetensors")
    for (name, _), value in zip(current.items(), shadow, strict=True):
        assert torch.equal(saved[name], value)


@pytest.mark.parametrize("method", ["g2rpo", "dance_grpo", "mix_grpo", "flow_grpo"])
def test_training_raises_the_reward_it_trains_on(
    smoke_assets: Path, tmp_path: Path, method: str
) -> None:
    """Not only plumbing: a few iterations move a simple reward up on other prompts and noise."""
    config = config_for(
        smoke_assets,
        method={"name": method},
        rollout={"group_size": 6, "prompts_per_iteration": 4},
        optimization={"iterations": 20, "learning_rate": 1e-2},
        validation={"file": str(smoke_assets / "prompts" / "test.txt"), "limit": 16, "every": 20},
    )
    trainer = trainer_for(config, tmp_path)
    before = trainer.validate()["validation/hps"]
    for _ in range(20):
        trainer.iterate()
    assert trainer.validate()["validation/hps"] > before + 0.02


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
