"""Training that is stopped, fills its disk or loses its lease: no finished work is lost."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import Brightness, config_for
from two_ranks import on_two_ranks

from g2rpo.attempts import LeaseSettings, attempt_path, latest
from g2rpo.errors import UserError
from g2rpo.lease import Lease
from g2rpo.stop import Stopped, StopRequest
from g2rpo.training import loop
from g2rpo.training.checkpoint.folder import latest_checkpoint, saved_iterations
from g2rpo.training.config import TrainConfig
from g2rpo.training.loop import Trainer
from g2rpo.training.metrics import read_metrics

ITERATIONS = 4
SELDOM = {"every": 50, "keep_last": 2, "every_minutes": None}
ALWAYS = SELDOM | {"every_minutes": 1e-9}
AT_ONCE = LeaseSettings(heartbeat_seconds=1000, stale_seconds=2000, wait_seconds=0)


class Disturbed(Trainer):
    """Something happens while iteration ``at`` is computed."""

    at = 0

    def iterate(self) -> dict[str, object]:
        row = super().iterate()
        if self.progress.iteration == self.at:
            self.disturb()
        return row

    def disturb(self) -> None:
        StopRequest.request("time is over", resume=True)


class FullDisk(Disturbed):
    """The metrics lie on a device that has no space left."""

    def disturb(self) -> None:
        path = self.run / "metrics.jsonl"
        path.unlink()
        path.symlink_to("/dev/full")


class FullCheckpoint(Disturbed):
    """The disk is full when the weights of the next checkpoint are written."""

    def disturb(self) -> None:
        def write(folder: Path) -> None:
            folder.mkdir()
            Path("/dev/full").write_text("weights")

        self.policy.save_transformer = write  # type: ignore[method-assign]


class Unscored(Disturbed):
    """The reward model can no longer be reached."""

    def disturb(self) -> None:
        def fail(scores: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            raise UserError("http://node7:8000: connection failed")

        self.engine.rewards["hps"] = Brightness(fail)


class Overtaken(Disturbed):
    """Somebody else takes the lease over."""

    def disturb(self) -> None:
        path = attempt_path(self.run / "lease", 1)
        os.utime(path, (1, 1))
        Lease.acquire(self.run, "lease", AT_ONCE)


def config_of(assets: Path, checkpoints: dict[str, object]) -> TrainConfig:
    settings = {"iterations": ITERATIONS, "learning_rate": 1e-3, "ema_decay": 0.5}
    return config_for(
        assets,
        optimization=settings,
        checkpoints=checkpoints,
        validation={"file": str(assets / "prompts" / "test.txt"), "limit": 2, "every": 2},
    )


def made(kind: type[Trainer], config: TrainConfig, run: Path, at: int = 0) -> Trainer:
    run.mkdir(parents=True, exist_ok=True)
    trainer = kind(config, run, rewards={"hps": Brightness()})
    trainer.at = at  # type: ignore[attr-defined]
    return trainer


def state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint: weights, optimiser and running average."""
    folder = latest_checkpoint(run)
    assert folder is not None
    assert folder.name == f"iteration-{ITERATIONS:06d}"
    return {
        f"{path.relative_to(folder)}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_run(run: Path, other: Path) -> None:
    ours, theirs = state(run), state(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    timed = {"device_seconds", "seconds"} | {
        f"seconds/{phase}" for phase in ("sampling", "scoring", "training")
    }
    rows, others = (
        [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(one)]
        for one in (run / "metrics.jsonl", other / "metrics.jsonl")
    )
    assert rows == others
    assert [row["iteration"] for row in rows] == list(range(ITERATIONS + 1))


@pytest.fixture(scope="module")
def undisturbed(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    made(Trainer, config_of(smoke_assets, SELDOM), run).train()
    assert saved_iterations(run) == [ITERATIONS]
    return run


def stopped(trainer: Trainer) -> Stopped:
    with pytest.raises(Stopped) as caught:
        trainer.train()
    StopRequest.clear()
    return caught.value


def test_stopped_after_each_iteration_ends_bit_identical(
    smoke_assets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    config = config_of(smoke_assets, SELDOM)
    for at in range(1, ITERATIONS):
        reason = stopped(made(Disturbed, config, tmp_path, at))
        assert (reason.reason, reason.resume) == ("time is over", True)
        assert saved_iterations(tmp_path)[-1] == at
    made(Trainer, config, tmp_path).train()
    assert_same_run(tmp_path, undisturbed)


def test_a_stop_before_the_first_iteration_or_in_the_last(
    smoke_assets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    config = config_of(smoke_assets, SELDOM)
    trainer = made(Disturbed, config, tmp_path, at=ITERATIONS)
    StopRequest.request("at once", resume=False)
    assert not stopped(trainer).resume
    assert saved_iterations(tmp_path) == []
    trainer.train()  # all is done when it looks
    assert StopRequest.requested() is not None
    assert_same_run(tmp_path, undisturbed)


def test_a_checkpoint_on_a_full_disk(smoke_assets: Path, undisturbed: Path, tmp_path: Path) -> None:
    config = config_of(smoke_assets, ALWAYS)
    trainer = made(FullCheckpoint, config, tmp_path, at=2)
    with pytest.raises(
        UserError, match=r"checkpoint iteration-000002 .*iteration-000001 is intact"
    ):
        trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-000001"]
    made(Trainer, config, tmp_path).train()
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("at", [2, 3, ITERATIONS])
def test_a_reward_that_fails(
    smoke_assets: Path, undisturbed: Path, tmp_path: Path, at: int
) -> None:
    """In the validation after iteration 2 or the last, or in the rollouts of iteration 4."""
    config = config_of(smoke_assets, SELDOM)
    with pytest.raises(UserError, match="node7:8000: connection failed"):
        made(Unscored, config, tmp_path, at=at).train()
    assert saved_iterations(tmp_path) == [at]
    made(Trainer, config, tmp_path).train()
    assert_same_run(tmp_path, undisturbed)


# --- two ranks -----------------------------------------------------------------------------------


def run_of_two(assets: Path, folder: Path) -> None:
    """What each of two ranks does in :func:`test_two_ranks`: only one of them is disturbed."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.end_training = lambda: None  # type: ignore[method-assign]
    loop.make_accelerator = lambda config, run: accelerator
    rank = accelerator.process_index
    ended: list[str] = []

    def train(kind: type[Trainer], name: str, at: int, of: dict[str, object] = SELDOM) -> None:
        config = config_of(assets, of)
        try:
            made(kind, config, folder / name, at).train()
            ended.append("done")
        except (UserError, Stopped) as error:
            ended.append(f"{type(error).__name__}: {error}")
        accelerator.wait_for_everyone()
        StopRequest.clear()

    train(Trainer, "undisturbed", 0)
    for at in (1, 3):
        train(Disturbed, "stopped", at if rank == 1 else 0)
    train(Trainer, "stopped", 0)
    train(Trainer, "timed", 0, ALWAYS)
    train(FullDisk, "full", 2 if rank == 0 else 0, ALWAYS)
    train(FullCheckpoint, "checkpoint", 2 if rank == 0 else 0, ALWAYS)
    run = folder / "overtaken"
    if rank == 0:
        with Lease.acquire(run, "lease", AT_ONCE):
            train(Overtaken, "overtaken", 2, ALWAYS)
    else:
        train(Trainer, "overtaken", 0, ALWAYS)
    (folder / f"ended-{rank}.json").write_text(json.dumps(ended))


def test_two_ranks(smoke_assets: Path, tmp_path: Path) -> None:
    assert on_two_ranks(run_of_two, smoke_assets, tmp_path) == 0
    first, second = (json.loads((tmp_path / f"ended-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    undisturbed, *stops, resumed, timed, full, checkpoint, overtaken = first
    assert [undisturbed, resumed, timed] == ["done"] * 3
    assert stops == ["Stopped: stopped: time is over"] * 2
    for part in ("full", "metrics.jsonl", "No space left", "free space", "iteration-000001"):
        assert part in full and "\n" not in full
    assert "iteration-000001 is intact" in checkpoint
    assert overtaken.startswith("LeaseLost: ")
    assert_same_run(tmp_path / "stopped", tmp_path / "undisturbed")
    assert_same_run(tmp_path / "timed", tmp_path / "undisturbed")
    assert saved_iterations(tmp_path / "timed") == [ITERATIONS - 1, ITERATIONS]
    for name in ("full", "checkpoint", "overtaken"):
        assert saved_iterations(tmp_path / name) == [1], name
    assert read_metrics(tmp_path / "overtaken" / "metrics.jsonl")[-1]["iteration"] == 1
    owner = latest(tmp_path / "overtaken", "lease")
    assert owner is not None
    assert (owner.number, owner.state) == (2, "running")
