"""Experiment trackers beside ``metrics.jsonl``."""

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import config_for, train_one_iteration, trainer_for

from g2rpo.errors import UserError
from g2rpo.training import collective


def test_tensorboard_has_each_iteration_once_after_a_resume(
    smoke_assets: Path, tmp_path: Path
) -> None:
    execution = {"device": "cpu", "trackers": ["tensorboard"]}
    config = config_for(smoke_assets, execution=execution)
    train_one_iteration(config, tmp_path)
    time.sleep(1)  # files of one second are read in the order of their names' last number, as text
    trainer_for(config, tmp_path).train()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "g2rpo"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_a_tracker_that_is_not_installed_is_named(
    smoke_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collective.importlib.util, "find_spec", lambda name: None)
    config = config_for(smoke_assets, execution={"device": "cpu", "trackers": ["wandb"]})
    with pytest.raises(UserError, match="names wandb, which is not installed"):
        trainer_for(config, tmp_path)
