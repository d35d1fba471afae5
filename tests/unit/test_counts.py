"""What a run will compute, counted beforehand, against what runs have counted."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
from training_runs import drawn_states

from g2rpo.methods.base import RolloutShape, iterations_by_rollout, method_names, parse_method
from g2rpo.training.config import TrainConfig, ValidationConfig
from g2rpo.training.counts import training_counts, validations
from reproduce.experiment import ROOT, ResolvedCell, expand, load_experiment, load_profile


def trained_cells(experiment: str, seed: int) -> Iterator[tuple[ResolvedCell, TrainConfig]]:
    for cell in expand(load_experiment(experiment), load_profile("mini"), [seed]):
        if cell.train is not None:
            yield cell, cell.train


@pytest.mark.parametrize(("experiment", "seed"), [("table1", 1), ("tuning", 101)])
def test_counts_are_those_of_committed_runs(experiment: str, seed: int) -> None:
    folder = ROOT / "results" / "mini" / experiment / "cells"
    paths = {
        cell.key: (folder / f"{cell.key.replace('/', '--')}__seed{seed}.json", cell, config)
        for cell, config in trained_cells(experiment, seed)
    }
    measured = [found for found in paths.values() if found[0].is_file()]
    assert len(measured) >= 5
    for path, cell, config in measured:
        cost = json.loads(path.read_text())["cell"]["cost"]
        counts = asdict(training_counts(config))
        states = counts.pop("training_backwards")
        if cell.method == "dance_grpo":  # steps drawn at random, which are averaged beforehand
            assert states == counts.pop("training_forwards")
            assert states == pytest.approx(cost["training_backwards"], rel=0.01)
            states = drawn_states(config)
        assert states == cost["training_backwards"], cell.key
        assert counts == {counter: cost[counter] for counter in counts}, cell.key


SHAPE = RolloutShape(steps=9, group_size=4, iterations=24)


@pytest.mark.parametrize("name", method_names())
def test_iterations_are_counted_by_their_rollout(name: str) -> None:
    method = parse_method({"name": name, **({"interval": 5} if name == "mix_grpo" else {})})
    counted = iterations_by_rollout(method, SHAPE)
    assert sum(counted.values()) == SHAPE.iterations
    assert (len(counted) > 1) == (name in ("mix_grpo", "flow_grpo_fast"))
    plain = [method.rollout_tree(SHAPE, i).velocity_evaluations for i in range(SHAPE.iterations)]
    assert sum(plain[i] * times for i, times in counted.items()) == sum(plain)


def test_published_iterations_of_g2rpo() -> None:
    """One prompt and iteration of the paper's setting: 1708 evaluations, 8 x 36 images and one."""
    data: dict[str, Any] = {
        "policy": {"source": "nowhere", "resolution": 720},
        "prompts": {"file": "nowhere.txt"},
        "rewards": {"hps": {"reward": {"model": "hps"}}},
        "grid": {"steps": 16},
        "method": {"name": "g2rpo", "granularities": [1, 2, 3]},
        "rollout": {"group_size": 12, "prompts_per_iteration": 1},
        "optimization": {"iterations": 1},
    }
    counts = training_counts(TrainConfig.model_validate(data))
    assert counts.rollout_evaluations == 1708
    assert (counts.training_forwards, counts.training_backwards) == (8, 8)


@pytest.mark.parametrize(
    ("every", "iterations", "expected"),
    [(5, 30, 7), (10, 30, 4), (7, 30, 6), (100, 30, 2), (1, 3, 4)],
)
def test_validations(every: int, iterations: int, expected: int) -> None:
    config = ValidationConfig(file="nowhere.txt", every=every)
    due = [n for n in range(1, iterations + 1) if n % every == 0 or n == iterations]
    assert validations(config, iterations) == 1 + len(due) == expected
    assert validations(None, iterations) == 0
