"""The reduction of a step's granularities against plain loops, and what must not change."""

import math
from collections.abc import Sequence

import pytest
import torch

from g2rpo.flow.rollout_tree import Group
from g2rpo.training.advantages import (
    AdvantageConfig,
    GranularityReduction,
    group_advantages,
    transition_advantages,
)

GROUPS = [Group((), step, granularity) for step in (0, 2) for granularity in (1, 2, 3)]
STEPS = (0, 2)
WEIGHTS = {"hps": 1.0, "clip": 0.5}


def rewards_of(seed: int, prompts: int = 2, size: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.01, 0.05, 0.2]).repeat(2).view(1, 6, 1)
    return {
        name: 0.3 + spread * torch.randn(prompts, 6, size, generator=generator) for name in WEIGHTS
    }


def found(
    rewards: dict[str, torch.Tensor], reduction: GranularityReduction, **settings: object
) -> tuple[torch.Tensor, ...]:
    config = AdvantageConfig.model_validate(
        {"granularity_reduction": reduction, "clip": 1e9, **settings}
    )
    return transition_advantages(rewards, WEIGHTS, GROUPS, STEPS, config).by_step


def normalized(values: Sequence[float], ddof: int = 1, epsilon: float = 1e-8) -> list[float]:
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof)
    return [(v - mean) / (math.sqrt(variance) + epsilon) for v in values]


def variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)


def loop(rows: list[list[float]], reduction: GranularityReduction) -> list[float]:
    """One reward at one step of one prompt: rows are its granularities."""
    samples = range(len(rows[0]))
    if reduction == "best_of":
        return normalized([max(row[i] for row in rows) for i in samples])
    if reduction == "reward_mean":
        return normalized([math.fsum(row[i] for row in rows) / len(rows) for i in samples])
    advantages = [normalized(row) for row in rows]
    if reduction == "inverse_variance":
        inverse = [1 / variance(row) for row in rows]
        weights = [len(rows) * one / math.fsum(inverse) for one in inverse]
    else:
        weights = [1.0 if reduction == "sum" else 1 / len(rows)] * len(rows)
    return [math.fsum(w * a[i] for w, a in zip(weights, advantages, strict=True)) for i in samples]


@pytest.mark.parametrize("reduction", ["sum", "mean", "inverse_variance", "best_of", "reward_mean"])
def test_every_rule_equals_its_loop(reduction: GranularityReduction) -> None:
    rewards = rewards_of(seed=3)
    for place, by_step in enumerate(found(rewards, reduction)):
        for prompt in range(2):
            expected = [0.0] * 6
            for name, weight in WEIGHTS.items():
                rows = rewards[name][prompt, 3 * place : 3 * place + 3].double().tolist()
                expected = [
                    e + weight * a for e, a in zip(expected, loop(rows, reduction), strict=True)
                ]
            assert by_step[prompt].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_granularity_whose_rewards_are_equal_has_no_weight() -> None:
    rewards = {"hps": rewards_of(seed=5)["hps"]}
    rewards["hps"][0, 1] = 0.3  # tells nothing, and would have an infinite precision
    config = AdvantageConfig(granularity_reduction="inverse_variance", clip=1e9)
    result = transition_advantages(rewards, {"hps": 1.0}, GROUPS, STEPS, config)
    first, _, third = (row.double().tolist() for row in rewards["hps"][0, :3])
    inverse = [1 / variance(first), 1 / variance(third)]
    expected = [
        3 * (inverse[0] * a + inverse[1] * b) / sum(inverse)
        for a, b in zip(normalized(first), normalized(third), strict=True)
    ]
    assert result.by_step[0][0].tolist() == pytest.approx(expected, rel=1e-9)
    assert result.zero_std_groups == {"hps": 1}
    rewards["hps"][0, :3] = 0.3
    result = transition_advantages(rewards, {"hps": 1.0}, GROUPS, STEPS, config)
    assert result.by_step[0][0].eq(0).all()


@pytest.mark.parametrize("combination", ["sum_of_rewards", "normalized_weights"])
@pytest.mark.parametrize("reduction", ["mean", "inverse_variance", "best_of", "reward_mean"])
def test_one_granularity_is_the_same_under_every_rule(
    reduction: GranularityReduction, combination: str
) -> None:
    groups = [Group((), 0, 1), Group((), 2, 1)]
    rewards = {name: values[:, :2] for name, values in rewards_of(seed=2).items()}
    settings = {"combination": combination}
    plain = AdvantageConfig.model_validate(settings)
    other = AdvantageConfig.model_validate({"granularity_reduction": reduction, **settings})
    before = transition_advantages(rewards, WEIGHTS, groups, STEPS, plain)
    after = transition_advantages(rewards, WEIGHTS, groups, STEPS, other)
    for one, two in zip(before.by_step, after.by_step, strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "best_of"])
def test_a_group_that_credits_every_step_is_left_alone(reduction: GranularityReduction) -> None:
    rewards = {"hps": rewards_of(seed=4)["hps"][:, :1]}
    config = AdvantageConfig(granularity_reduction=reduction)
    result = transition_advantages(rewards, {"hps": 1.0}, [Group(())], (0, 1, 5), config)
    plain = group_advantages(rewards, {"hps": 1.0}, AdvantageConfig()).values[:, 0]
    assert all(torch.allclose(values, plain.clamp(-5, 5)) for values in result.by_step)


def test_the_usual_rule_leaves_the_configuration_as_it_was() -> None:
    assert "granularity_reduction" not in AdvantageConfig().model_dump(mode="json")
    assert (
        AdvantageConfig(granularity_reduction="mean").model_dump(mode="json")[
            "granularity_reduction"
        ]
        == "mean"
    )
