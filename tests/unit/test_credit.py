"""The credit of stochastic steps against closed forms, and its measurement on tiny models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import config_for, trainer_for

from benchmarks.evaluation.credit import (
    StepCredit,
    distinct_rollouts,
    explained_shares,
    joined_gradient,
    measure_credit,
    step_gradients,
)
from benchmarks.evaluation.protocol import CreditConfig
from g2rpo.data.prompts import Prompt
from g2rpo.flow.rollout_tree import RolloutTree, credited_to, recorded_steps
from g2rpo.flow.sweep import INITIAL_NOISE, Noise
from g2rpo.methods import dance_grpo, flow_grpo, g2rpo, mix_grpo
from g2rpo.methods.base import Method, RolloutShape
from g2rpo.seeds import gaussian
from g2rpo.stop import Stopped, StopRequest
from g2rpo.training.batch import training_batch
from g2rpo.training.measuring import GradientMoments
from reproduce.experiment import load_profile
from reproduce.jobs.estimates import Estimator
from reproduce.jobs.speeds import speeds_of

WEIGHTS = {INITIAL_NOISE: 5.0, 0: 1.0, 1: 2.0, 2: 0.5, 3: 0.0, 4: 1.5, 5: 1.0}
STEPS = 6
PROMPTS = [Prompt(id=f"{number:06d}", text=f"prompt {number}") for number in range(6)]


@dataclass(frozen=True)
class Linear:
    """An engine whose reward is the weighted sum of the noises on an image's way."""

    seed: int = 0

    def noise(self, prompts: Sequence[Prompt], iteration: int) -> Noise:
        def draw(prompt: int, sample: int, step: int) -> torch.Tensor:
            return gaussian((1,), self.seed, "noise", iteration, prompts[prompt].id, sample, step)

        return draw

    def run(self, tree: RolloutTree, prompts: Sequence[Prompt], _: int, noise: Noise) -> Any:
        def reward(prompt: int, image: int) -> float:
            total, at = 0.0, tree.states[image]
            while at.parent is not None:
                if at.sample is not None:
                    total += WEIGHTS[at.node - 1] * float(noise(prompt, at.sample, at.node - 1))
                at = tree.states[at.parent]
            return total + WEIGHTS[INITIAL_NOISE] * float(
                noise(prompt, at.sample or 0, INITIAL_NOISE)
            )

        rows = [
            [[reward(p, image) for image in group.images] for group in tree.groups]
            for p in range(len(prompts))
        ]
        return SimpleNamespace(tree=tree, group_rewards=lambda _: torch.tensor(rows))


def shares(method: Method, samples: int = 96) -> Mapping[int, float]:
    shape = RolloutShape(steps=STEPS, group_size=4, iterations=12)
    trainer: Any = SimpleNamespace(
        engine=Linear(),
        config=SimpleNamespace(method=method, shape=shape, rewards={"hps": None}),
        weights=SimpleNamespace(rollout=torch.no_grad),
        accelerator=SimpleNamespace(num_processes=1),
    )
    found = explained_shares(trainer, PROMPTS, 0, samples)
    return {step: values["hps"] for step, values in found.items()}


@pytest.mark.parametrize(
    ("method", "noisy", "recorded"),
    [
        (dance_grpo.DanceGRPO(), [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        (flow_grpo.FlowGRPO(), [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4]),
        (
            flow_grpo.FlowGRPO(shared_initial_noise=False),
            [INITIAL_NOISE, 0, 1, 2, 3, 4, 5],
            [0, 1, 2, 3, 4],
        ),
        (mix_grpo.MixGRPO(window_size=3), [0, 1, 2], [0, 1, 2]),
    ],
)
def test_the_share_is_that_of_a_reward_which_is_linear_in_the_noise(
    method: Method, noisy: list[int], recorded: list[int]
) -> None:
    found = shares(method)
    assert list(found) == recorded
    total = sum(WEIGHTS[step] ** 2 for step in noisy)
    for step, share in found.items():
        assert share == pytest.approx(WEIGHTS[step] ** 2 / total, abs=4 / math.sqrt(96 * 6))


def test_noise_at_one_step_alone_explains_everything_whatever_the_granularity() -> None:
    found = shares(g2rpo.G2RPO(stochastic_steps=(0, 1, 4), granularities=(1, 2)), samples=8)
    assert found == pytest.approx({0: 1.0, 1: 1.0, 4: 1.0})


@pytest.mark.parametrize(
    "method",
    [
        g2rpo.G2RPO(stochastic_steps=(0, 1, 4), granularities=(1, 2)),
        mix_grpo.MixGRPO(window_size=3),
    ],
)
def test_the_part_of_a_rollout_that_credits_a_step_has_the_same_images(method: Method) -> None:
    tree = method.rollout_tree(RolloutShape(steps=STEPS, group_size=3, iterations=12), 0)

    def way(of: RolloutTree, state: int | None) -> list[tuple[int, int | None]]:
        if state is None:
            return []
        at = of.states[state]
        return [*way(of, at.parent), (at.node, at.sample)]

    for step in recorded_steps(tree):
        part = credited_to(tree, step)
        groups = [group for group in tree.groups if group.step in (None, step)]
        assert recorded_steps(part) == [step]
        assert [g.granularity for g in part.groups] == [g.granularity for g in groups]
        for whole, own in zip(groups, part.groups, strict=True):
            ways = [way(tree, image) for image in whole.images]
            assert [way(part, image) for image in own.images] == ways
        if len(groups) < len(tree.groups):
            assert part.velocity_evaluations < tree.velocity_evaluations


# --- the gradient --------------------------------------------------------------------------------


def test_moments_equal_their_definitions() -> None:
    generator = np.random.default_rng(3)
    draws = generator.normal(size=(7, 12)) + np.linspace(-1, 1, 12)
    moments = GradientMoments()
    for draw in draws:
        moments.add([torch.tensor(draw[:5]), torch.tensor(draw[5:].reshape(7, 1))])
    mean = draws.mean(axis=0)
    spread = ((draws - mean) ** 2).sum() / 6
    assert moments.noise == pytest.approx(spread)
    assert moments.signal == pytest.approx((mean**2).sum() - spread / 7)
    assert StepCredit(0, 0.9, {}, signal=0.0, noise=0.0).ratio == 0.0


def test_signal_and_noise_are_unbiased() -> None:
    generator, true = np.random.default_rng(0), np.full(4, 0.3)
    signals, noises = [], []
    for _ in range(2000):
        moments = GradientMoments()
        for draw in generator.normal(size=(4, 4)) + true:
            moments.add([torch.tensor(draw)])
        signals.append(moments.signal)
        noises.append(moments.noise)
    assert np.mean(signals) == pytest.approx((true**2).sum(), abs=0.06)
    assert np.mean(noises) == pytest.approx(4.0, rel=0.03)


@pytest.mark.parametrize(("most", "expected"), [(10, [0, 2, 4, 6]), (3, [0, 4, 6]), (1, [0])])
def test_rollouts_of_a_moving_window_are_chosen_evenly(most: int, expected: list[int]) -> None:
    method = mix_grpo.MixGRPO(window_size=2, interval=2)
    shape = RolloutShape(steps=6, group_size=4, iterations=8)
    config = SimpleNamespace(method=method, shape=shape, optimization=SimpleNamespace(iterations=8))
    trainer: Any = SimpleNamespace(config=config)
    assert distinct_rollouts(trainer, most) == expected


def test_the_gradient_of_all_steps_is_that_of_one_backward(
    smoke_assets: Path, tmp_path: Path
) -> None:
    config = config_for(smoke_assets, method={"name": "dance_grpo"}, grid={"steps": 5})
    trainer = trainer_for(config, tmp_path)
    before = [parameter.detach().clone() for parameter in trainer.weights.parameters]
    prompts = trainer.local_prompts()
    tree = config.method.rollout_tree(config.shape, 0)
    rollout = trainer.engine.run(tree, prompts, 0)
    joined = joined_gradient(step_gradients(trainer, rollout, prompts))
    batch = training_batch(rollout, prompts, trainer.config)
    trainer.updater.backward(batch)
    largest = max(
        float(p.grad.abs().max()) for p in trainer.weights.parameters if p.grad is not None
    )
    for part, parameter in zip(joined, trainer.weights.parameters, strict=True):
        expected = torch.zeros_like(part) if parameter.grad is None else parameter.grad
        assert torch.allclose(part, expected, atol=1e-5 * largest)
    trainer.weights.drop_gradients()
    measured = measure_credit(trainer, CreditConfig(samples=4, repeats=3), tmp_path)
    assert [step.step for step in measured[0].steps] == [0, 1, 2, 3]
    assert all(step.ratio == step.signal / step.noise for step in measured[0].steps)
    after = trainer.weights.parameters
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert trainer.progress == replace(trainer.progress, iteration=0)


def test_an_interrupted_measurement_resumes_with_the_same_result(
    smoke_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": "mix_grpo", "window_size": 2, "interval": 1}
    config = config_for(smoke_assets, method=method, grid={"steps": 6})
    trainer: Any = trainer_for(config, tmp_path)
    settings = CreditConfig(samples=4, repeats=3, rollouts=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    uncut = measure_credit(trainer, settings, whole)
    # Asked to stop in the second rollout, after the first of its repeats.
    answers = iter([False, False, False, True])
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "obey", lambda: stop_if(next(answers)))
        with pytest.raises(Stopped):
            measure_credit(trainer, settings, parts)
    assert len(list(parts.iterdir())) == 1
    trainer.engine = Counting(trainer.engine)
    assert measure_credit(trainer, settings, parts) == uncut
    once = trainer.engine.evaluations
    assert measure_credit(trainer, settings, parts) == uncut
    assert trainer.engine.evaluations == once > 0
    next(parts.iterdir()).write_text("{")
    assert measure_credit(trainer, settings, parts) == uncut
    assert trainer.engine.evaluations > once


def stop_if(asked: bool) -> None:
    if asked:
        raise Stopped("asked to", resume=False)


class Counting:
    """An engine that counts the NFE of another."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.noise, self.evaluations = engine, engine.noise, 0

    def run(self, *arguments: Any) -> Any:
        rollout = self.engine.run(*arguments)
        self.evaluations += rollout.velocity_evaluations
        return rollout


@pytest.mark.parametrize(
    "method",
    [
        {"name": "g2rpo", "stochastic_steps": "all"},
        {"name": "mix_grpo", "window_size": 2, "interval": 1},
    ],
)
def test_the_plan_counts_what_is_evaluated(
    smoke_assets: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    config = config_for(smoke_assets, method=method, grid={"steps": 6})
    trainer: Any = trainer_for(config, tmp_path)
    trainer.engine = Counting(trainer.engine)
    settings = CreditConfig(samples=4, repeats=3, rollouts=2)
    measure_credit(trainer, settings, tmp_path)
    smoke = load_profile("smoke")
    planned = Estimator(smoke, speeds_of(smoke)).credit(config, settings).count("evaluation")
    # The windows at the end of the grid are smaller; a plan takes the first and the mean of all.
    assert planned == pytest.approx(trainer.engine.evaluations, rel=0.15)
    if method["name"] == "g2rpo":
        assert planned == trainer.engine.evaluations
