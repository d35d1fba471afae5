"""G2RPO's choices during training: drawn steps, adaptive steps and adaptive granularities."""

from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from training_runs import ADAPTIVE, config_for, trainer_for, weights

from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import recorded_steps
from g2rpo.methods.adaptive import (
    AdaptiveGranularities,
    AdaptiveSteps,
    rank_correlations,
    signal_to_noise_ratios,
    with_newer,
)
from g2rpo.methods.base import RolloutShape
from g2rpo.methods.g2rpo import G2RPO
from g2rpo.training.batch import training_batch
from g2rpo.training.config import TrainConfig
from g2rpo.training.counts import training_counts
from g2rpo.training.measuring import measure_agreement, measure_gradients
from g2rpo.training.metrics import read_metrics
from g2rpo.training.update import loss

SHAPE = RolloutShape(steps=6, group_size=3, iterations=20, seed=3)
DRAWN = {"name": "g2rpo", "stochastic_steps": "all", "granularities": [1], "drawn_steps": 2}


# --- drawn steps ---------------------------------------------------------------------------------


def test_steps_are_drawn_afresh_from_the_seed_and_the_iteration() -> None:
    method = G2RPO(stochastic_steps="all", drawn_steps=2)
    drawn = Counter(tuple(recorded_steps(method.rollout_tree(SHAPE, i))) for i in range(2000))
    assert set(drawn) == set(combinations(range(5), 2))
    # 2000 draws at 1 in 10: standard deviation 13.4.
    assert all(abs(count - 200) < 5 * 13.4 for count in drawn.values())
    phases = [method.phase(SHAPE, iteration) for iteration in range(20)]
    assert phases == [method.phase(replace(SHAPE, iterations=9), i) for i in range(20)]
    assert phases != [method.phase(replace(SHAPE, seed=4), i) for i in range(20)]


# --- decisions -----------------------------------------------------------------------------------


def test_the_steps_with_the_largest_ratio_are_chosen() -> None:
    rule = AdaptiveSteps(count=2)
    sums = {
        "signal/0": 4.0, "noise/0": 8.0, "signal/2": -1.0, "noise/2": 1.0,
        "signal/3": 3.0, "noise/3": 2.0, "signal/5": 1.0, "noise/5": 4.0,
    }  # fmt: skip
    assert signal_to_noise_ratios(sums) == {0: 0.5, 2: -1.0, 3: 1.5, 5: 0.25}
    assert rule.chosen((0, 2, 3, 5), sums) == (0, 3)
    assert rule.chosen((0, 2, 5), sums) == (0, 5)
    assert rule.chosen((0, 2, 3, 5), None) == (3, 5)  # planned: the cheapest


@pytest.mark.parametrize(
    ("agreements", "expected"),
    [
        ({(1, 2): 0.9, (1, 3): 0.2, (2, 3): 0.2}, (3, 2)),
        ({(1, 2): 0.9, (1, 3): 0.2, (2, 3): 0.9}, (3, 1)),  # 2 is dropped, so 1 is compared with 3
        ({(1, 2): 0.9, (1, 3): 0.9, (2, 3): 0.9}, (3,)),
        ({(1, 2): 0.5, (1, 3): 0.5, (2, 3): 0.5}, (3, 2, 1)),
        ({}, (3, 2, 1)),  # no group had a ranking
    ],
)
def test_a_granularity_that_agrees_with_a_kept_coarser_one_is_dropped(
    agreements: dict[tuple[int, int], float], expected: tuple[int, ...]
) -> None:
    sums = {f"agreement/{a}/{b}": 4 * value for (a, b), value in agreements.items()}
    sums |= {f"groups/{a}/{b}": 4.0 for a, b in agreements}
    assert rank_correlations(sums) == pytest.approx(agreements)
    rule = AdaptiveGranularities(threshold=0.5)
    assert rule.chosen((3, 2, 1), sums) == expected
    assert rule.chosen((3, 2, 1), None) == (3,)  # planned: the cheapest


def test_older_sums_are_halved_at_each_measurement() -> None:
    first = with_newer(None, {"signal/0": 4.0, "noise/0": 2.0})
    assert first == {"signal/0": 4.0, "noise/0": 2.0}
    second = with_newer(first, {"signal/0": 1.0, "noise/0": 3.0, "signal/1": 5.0})
    assert second == {"signal/0": 3.0, "noise/0": 4.0, "signal/1": 5.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drawn_steps": 5}, "method.drawn_steps: 5 of 5 stochastic steps"),
        ({"drawn_steps": 0}, "drawn_steps"),
        ({"adaptive_steps": {"count": 6}}, "method.adaptive_steps.count: 6 of 5"),
        ({"adaptive_steps": {}}, "missing key 'method.adaptive_steps.count'"),
        ({"adaptive_steps": {"count": 2}, "drawn_steps": 2}, "not both"),
        ({"adaptive_granularities": {}, "granularities": [2]}, "two or more different"),
        ({"adaptive_granularities": {}, "granularities": [1, 2, 2]}, "two or more different"),
        ({"adaptive_granularities": {"threshold": 1.5}}, "threshold"),
    ],
)
def test_choices_without_a_choice_are_refused(changes: dict[str, Any], message: str) -> None:
    data = {
        "policy": {"source": "nowhere", "resolution": 32}, "prompts": {"file": "nowhere.txt"},
        "rewards": {"hps": {"reward": {"model": "hps"}}}, "grid": {"steps": 6},
        "method": {"name": "g2rpo", "stochastic_steps": "all", **changes},
    }  # fmt: skip
    with pytest.raises(UserError, match=message) as caught:
        validate(TrainConfig, data, "here")
    assert "\n" not in str(caught.value)


def test_methods_without_choices_keep_their_settings() -> None:
    assert set(G2RPO().model_dump()) == {
        "name", "eta", "stochastic_steps", "granularities", "log_anchor_reward",
    }  # fmt: skip


# --- measurements --------------------------------------------------------------------------------


def test_the_measured_ratio_is_that_of_the_gradients_of_two_halves(
    smoke_assets: Path, tmp_path: Path
) -> None:
    rollout = {"group_size": 3, "prompts_per_iteration": 4}
    trainer = trainer_for(config_for(smoke_assets, rollout=rollout), tmp_path)
    prompts = trainer.local_prompts()
    drawn = trainer.rollout(prompts)
    batch = training_batch(drawn, prompts, trainer.config)
    sums, computed = measure_gradients(trainer.updater, batch, prompts=4)
    assert sum(statistics.backwards for statistics in computed) == 2 * 4  # steps and prompts
    assert all(parameter.grad is None for parameter in trainer.weights.parameters)
    for step in (0, 1):
        halves = []
        for half in ((0, 1), (2, 3)):
            members = enumerate(batch.state_of.tolist())
            here = [
                n for n, at in members if batch.steps[at] == step and int(batch.prompts[at]) in half
            ]
            total = loss(trainer.policy, batch.update(torch.tensor(here)), trainer.config).loss
            parts = torch.autograd.grad(total, trainer.weights.parameters, allow_unused=True)
            halves.append(torch.cat([p.double().flatten() for p in parts if p is not None]))
        one, other = halves
        assert sums[f"signal/{step}"] == pytest.approx(float(one @ other), rel=1e-4, abs=1e-9)
        # A half is the mean of two prompts, so one prompt has twice its variance.
        noise = float((one - other).square().sum()) / 2 * 2
        assert sums[f"noise/{step}"] == pytest.approx(noise, rel=1e-4)


def test_agreement_is_the_mean_of_spearmans_correlation(smoke_assets: Path, tmp_path: Path) -> None:
    config = config_for(
        smoke_assets,
        method={"name": "g2rpo", "granularities": [1, 3, 2], "stochastic_steps": [0, 2]},
        grid={"steps": 6},
        rollout={"group_size": 5, "prompts_per_iteration": 3},
    )
    trainer = trainer_for(config, tmp_path)
    rollout = trainer.rollout(trainer.local_prompts())
    sums = measure_agreement(rollout, config)
    rewards = rollout.group_rewards("hps")
    for fine, coarse in ((1, 2), (1, 3), (2, 3)):
        expected = [
            scipy.stats.spearmanr(rewards[prompt, first], rewards[prompt, second]).statistic
            for first, one in enumerate(rollout.tree.groups)
            for second, other in enumerate(rollout.tree.groups)
            if (one.granularity, other.granularity) == (fine, coarse) and one.step == other.step
            for prompt in range(3)
        ]
        assert sums[f"groups/{fine}/{coarse}"] == len(expected) == 6
        assert sums[f"agreement/{fine}/{coarse}"] == pytest.approx(sum(expected))


# --- whole runs ----------------------------------------------------------------------------------


def choosing(assets: Path, method: dict[str, Any], **changes: Any) -> TrainConfig:
    return config_for(assets, method=method, optimization={"iterations": 6}, **changes)


@pytest.mark.parametrize("method", [ADAPTIVE, DRAWN], ids=["adaptive", "drawn"])
def test_a_resumed_run_makes_the_same_choices_and_ends_bit_identical(
    method: dict[str, Any], smoke_assets: Path, tmp_path: Path
) -> None:
    config = choosing(smoke_assets, method)
    whole = trainer_for(config, tmp_path / "whole").train()
    for _ in range(2):  # a new process would read the same checkpoint
        trainer = trainer_for(config, tmp_path / "parts")
        for _ in range(2):
            trainer.iterate()
        trainer.save()
    resumed = trainer_for(config, tmp_path / "parts").train()
    assert replace(resumed, device_seconds=0.0) == replace(whole, device_seconds=0.0)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name])


def test_measuring_iterations_use_everything_and_their_cost_is_counted(
    smoke_assets: Path, tmp_path: Path
) -> None:
    config = choosing(smoke_assets, ADAPTIVE)
    progress = trainer_for(config, tmp_path).train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    backwards = [row["training_backwards"] for row in rows]
    # Two prompts; 4 steps are trained and measured in iterations 0, 2 and 4, else 2 are trained.
    spent = [after - before for before, after in pairwise([0, *backwards])]
    assert spent == [16, 4, 16, 4, 16, 4]
    planned = training_counts(config)
    assert planned.training_backwards == progress.training_backwards
    assert planned.rollout_evaluations <= progress.rollout_evaluations
    everything = G2RPO(stochastic_steps="all", granularities=(1, 2)).rollout_tree(config.shape, 0)
    assert rows[0]["rollout_evaluations"] == 2 * everything.velocity_evaluations
    assert {f"signal_to_noise/{step}" for step in range(4)} < set(rows[0])
    assert -1 <= rows[0]["agreement/1-2"] <= 1
    assert progress.measurements is not None


def test_a_limit_on_the_cost_ends_a_run_as_a_finished_one(
    smoke_assets: Path, tmp_path: Path
) -> None:
    config = choosing(smoke_assets, ADAPTIVE)
    trainer_for(config, tmp_path / "whole").train()
    costs = [
        row["rollout_evaluations"] + 3 * row["training_backwards"]
        for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")
    ]
    for limit, done in ((costs[2], 3), (costs[2] + 1, 4), (costs[-1] + 1, 6)):
        settings = config.optimization.model_copy(update={"max_equal_cost": limit})
        run = tmp_path / str(limit)
        limited = config.model_copy(update={"optimization": settings})
        assert trainer_for(limited, run).train().iteration == done
        assert trainer_for(limited, run).finished


def test_an_odd_number_of_prompts_cannot_be_halved(smoke_assets: Path, tmp_path: Path) -> None:
    config = choosing(smoke_assets, ADAPTIVE, rollout={"group_size": 3, "prompts_per_iteration": 3})
    with pytest.raises(UserError, match="use a multiple of 2") as caught:
        trainer_for(config, tmp_path)
    assert "\n" not in str(caught.value)
