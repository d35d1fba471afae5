"""Adaptive choices on two ranks: both make the same, and those that one rank makes."""

import json
from pathlib import Path

import pytest
from engine_runs import config_for
from training_runs import ADAPTIVE, trainer_for
from two_ranks import on_two_ranks

from g2rpo.training.config import TrainConfig

ITERATIONS = 3


def adaptive_config(assets: Path) -> TrainConfig:
    method = ADAPTIVE | {"adaptive_granularities": {"threshold": 0.5, "every": 2}}
    # In float64 the order of sums, which differs, hardly matters.
    return config_for(assets, method=method, policy={"dtype": "float64"})


def choices(assets: Path, run: Path) -> tuple[str, int]:
    """What was chosen after each iteration with its cost, as JSON, and the rank."""
    trainer = trainer_for(adaptive_config(assets), run)
    found = []
    for _ in range(ITERATIONS):
        trainer.iterate()
        progress, config = trainer.progress, trainer.config
        branches = config.method.phase(config.shape, 1, progress.measurements)
        found.append((branches, progress.measurements, progress.equal_cost_evaluations))
    return json.dumps(found), trainer.accelerator.process_index


def write_choices(assets: Path, folder: Path) -> None:
    text, rank = choices(assets, folder / "run")
    (folder / f"{rank}.json").write_text(text)


def test_two_ranks_choose_as_one_does(smoke_assets: Path, tmp_path: Path) -> None:
    assert on_two_ranks(write_choices, smoke_assets, tmp_path) == 0
    first, second = ((tmp_path / f"{rank}.json").read_text() for rank in (0, 1))
    assert first == second
    alone = json.loads(choices(smoke_assets, tmp_path / "alone")[0])
    for (branches, sums, cost), (own, own_sums, own_cost) in zip(
        json.loads(first), alone, strict=True
    ):
        assert (branches, cost) == (own, own_cost)
        assert sums == pytest.approx(own_sums, rel=1e-6)
