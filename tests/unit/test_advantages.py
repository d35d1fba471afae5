"""Group advantages against plain loops, the equal-rewards trap, and invariants."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch

from g2rpo.flow.rollout_tree import Group
from g2rpo.training.advantages import (
    AdvantageConfig,
    GranularityReduction,
    group_advantages,
    normalize,
    ranks,
    step_advantages,
    transition_advantages,
)


def random_rewards(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.25 + 0.02 * torch.randn(*shape, generator=generator)


def loop_std(values: Sequence[float], ddof: int) -> float:
    center = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - center) ** 2 for v in values) / (len(values) - ddof))


def loop_group(values: Sequence[float], ddof: int, epsilon: float) -> list[float]:
    center = math.fsum(values) / len(values)
    scale = loop_std(values, ddof) + epsilon
    return [(value - center) / scale for value in values]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-4, 0.1, 0.0])
def test_group_normaliser_equals_the_loop(ddof: int, epsilon: float) -> None:
    rewards = random_rewards(3, 4, 12)
    found, equal = normalize(rewards, AdvantageConfig(ddof=ddof, epsilon=epsilon))
    assert found.dtype == torch.float64
    assert not equal.any()
    for prompt in range(3):
        for group in range(4):
            expected = loop_group(rewards[prompt, group].tolist(), ddof, epsilon)
            assert found[prompt, group].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ddof", [0, 1])
def test_global_std_takes_the_group_mean_and_the_std_of_everything(ddof: int) -> None:
    rewards = random_rewards(3, 1, 6) + torch.tensor([0.0, 0.5, -0.2]).view(3, 1, 1)
    config = AdvantageConfig(normalizer="global_std", ddof=ddof, epsilon=1e-4)
    found, _ = normalize(rewards, config)
    scale = loop_std(rewards.double().flatten().tolist(), ddof) + 1e-4
    for prompt in range(3):
        values = rewards[prompt, 0].tolist()
        center = math.fsum(values) / 6
        expected = [(value - center) / scale for value in values]
        assert found[prompt, 0].tolist() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("normalizer", ["group", "global_std"])
def test_groups_of_unequal_size_are_normalised_over_what_is_there(
    normalizer: Literal["group", "global_std"], ddof: int
) -> None:
    rewards = random_rewards(5, 6)
    rewards[3] = 0.25
    sizes = [6, 4, 2, 5, 1]  # equal rewards; nothing to compare with
    present = torch.arange(6) < torch.tensor(sizes)[:, None]
    config = AdvantageConfig(normalizer=normalizer, ddof=ddof)
    found, equal = normalize(rewards.where(present, math.nan), config, present=present)
    everything = loop_std(rewards[present].double().tolist(), ddof) + config.epsilon
    for group, size in enumerate(sizes[:3]):
        values = rewards[group, :size].double().tolist()
        center = math.fsum(values) / size
        scale = everything if normalizer == "global_std" else loop_std(values, ddof) + 1e-8
        expected = [(value - center) / scale for value in values] + [0.0] * (6 - size)
        assert found[group].tolist() == pytest.approx(expected, rel=1e-10)
    assert found[3:].eq(0).all()
    assert equal.tolist() == [False, False, False, True, True]
    _, equal = normalize(rewards, config, present=torch.ones(5, 6, dtype=torch.bool))
    assert torch.equal(equal, normalize(rewards, config)[1])


# --- equal rewards -------------------------------------------------------------------------------


def test_rewards_equal_up_to_rounding_have_no_advantage() -> None:
    """The trap: in float32 the mean of equal numbers is not that number."""
    rounded = np.float32(0.2763)
    worst = 0.0
    for size in range(2, 40):
        values = np.full(size, rounded, dtype=np.float32)
        mean = np.float32(0)
        for value in values:
            mean += value
        mean /= np.float32(size)
        spread = values - mean
        std = np.sqrt((spread**2).sum() / np.float32(size - 1))
        worst = max(worst, float(np.abs(spread / (std + np.float32(1e-8))).max()))
        assert normalize(torch.from_numpy(values), AdvantageConfig())[0].eq(0).all()
    assert worst > 0.5  # computed naively, noise looks like a preference


@pytest.mark.parametrize("level", [1.0, -1.0, 0.2763, 25.0, 1e-4, 0.0])
@pytest.mark.parametrize("normalizer", ["group", "global_std"])
def test_a_few_units_in_the_last_place_are_equal(level: float, normalizer: str) -> None:
    base = np.float32(level)
    above = np.nextafter(base, np.float32(np.inf))
    flat = [base, above, base, np.nextafter(above, np.float32(np.inf)), base, above]
    varied = [base * np.float32(f) + np.float32(0.01 * i) for i, f in enumerate((1, 2, 1, 3, 1, 2))]
    rewards = torch.tensor(
        np.array([[flat], [varied], [[base] * 6]], dtype=np.float32).reshape(3, 1, 6)
    )
    if level == 0.0:
        rewards[0] = 0.0
    found, equal = normalize(rewards, AdvantageConfig(normalizer=normalizer))
    assert equal.flatten().tolist() == [True, False, True]
    assert found[::2].eq(0).all()
    assert found[1].abs().max() > 0.1


def test_a_small_but_real_difference_is_kept() -> None:
    rewards = torch.tensor([0.25, 0.25, 0.25001, 0.25])
    found, equal = normalize(rewards, AdvantageConfig())
    assert not equal
    assert float(found[2]) == pytest.approx(1.5, rel=1e-2)


def test_equal_rewards_without_epsilon_are_not_a_division_by_zero() -> None:
    for normalizer in ("group", "global_std"):
        config = AdvantageConfig(normalizer=normalizer, epsilon=0.0)
        found, equal = normalize(torch.full((2, 3, 4), 0.7), config)
        assert found.eq(0).all()
        assert equal.all()


def test_a_sum_of_cancelling_rewards_is_compared_at_the_size_of_its_terms() -> None:
    one = np.float32(1.0)
    above = np.nextafter(one, np.float32(2))
    rewards = {
        "a": torch.tensor([one, above, one, above]).view(1, 1, 4),
        "b": torch.tensor([-one, -one, -one, -one]).view(1, 1, 4),
    }
    config = AdvantageConfig(combination="sum_of_rewards")
    found, zero_std_groups = group_advantages(rewards, {"a": 1.0, "b": 1.0}, config)
    assert found.eq(0).all()
    assert zero_std_groups == {"sum": 1}


# --- trimming ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "dropped"), [(0.1, 0), (0.25, 2), (0.5, 4)])
@pytest.mark.parametrize("ddof", [0, 1])
def test_the_lowest_rewards_do_not_count_in_the_statistics(
    ratio: float, dropped: int, ddof: int
) -> None:
    rewards = random_rewards(3, 2, 8)
    found, _ = normalize(rewards, AdvantageConfig(trimmed_ratio=ratio, ddof=ddof))
    for prompt in range(3):
        for group in range(2):
            values = rewards[prompt, group].double().tolist()
            counted = sorted(values)[dropped:]
            center, scale = math.fsum(counted) / len(counted), loop_std(counted, ddof) + 1e-8
            expected = [(value - center) / scale for value in values]
            assert found[prompt, group].tolist() == pytest.approx(expected, rel=1e-11)


def test_trimming_needs_the_statistics_of_groups() -> None:
    with pytest.raises(ValueError, match="trimmed_ratio needs"):
        AdvantageConfig(trimmed_ratio=0.2, normalizer="global_std")


# --- whitening -----------------------------------------------------------------------------------


def test_whitening_normalises_each_step_over_the_batch_before_the_clamp() -> None:
    rewards = {n: random_rewards(3, 2, 6, seed=i) for i, n in enumerate(WEIGHTS)}
    groups = [Group((), step=1), Group((), step=5)]
    config = AdvantageConfig(whiten=True, epsilon=1e-4, clip=1.2)
    found = transition_advantages(rewards, WEIGHTS, groups, (1, 5), config)
    for place, by_step in enumerate(found.by_step):
        summed = [
            math.fsum(w * one for w, one in zip(WEIGHTS.values(), each, strict=True))
            for prompt in range(3)
            for each in zip(
                *(loop_group(rewards[n][prompt, place].tolist(), 1, 1e-4) for n in WEIGHTS),
                strict=True,
            )
        ]
        expected = [min(max(a, -1.2), 1.2) for a in loop_group(summed, 1, 1e-4)]
        assert 0 < sum(abs(a) == 1.2 for a in expected) < 18
        assert by_step.flatten().tolist() == pytest.approx(expected, rel=1e-10)


def test_whitening_leaves_a_batch_of_equal_rewards_at_zero() -> None:
    config = AdvantageConfig(whiten=True, epsilon=0.0)
    rewards = {"hps": torch.full((2, 1, 4), 0.3)}
    found = transition_advantages(rewards, {"hps": 1.0}, [Group(())], (0,), config)
    assert found.by_step[0].eq(0).all()


# --- combinations --------------------------------------------------------------------------------

REWARDS = {"hps": random_rewards(2, 3, 6, seed=1), "clip": 8 * random_rewards(2, 3, 6, seed=2)}
WEIGHTS = {"hps": 2.0, "clip": 0.5}


def loop_ranks(values: list[float]) -> list[float]:
    return [
        sum(1.0 if other < one else 0.5 if other == one else 0.0 for other in values) + 0.5
        for one in values
    ]


@pytest.mark.parametrize(
    "combination", ["sum", "normalized_weights", "sum_of_rewards", "mean_of_ranks"]
)
def test_combinations_equal_the_loop(combination: str) -> None:
    found, _ = group_advantages(REWARDS, WEIGHTS, AdvantageConfig(combination=combination))
    for prompt in range(2):
        for group in range(3):
            hps = REWARDS["hps"][prompt, group].double().tolist()
            clip = REWARDS["clip"][prompt, group].double().tolist()
            if combination == "sum_of_rewards":
                summed = [2.0 * h + 0.5 * c for h, c in zip(hps, clip, strict=True)]
                expected = loop_group(summed, 1, 1e-8)
            elif combination == "mean_of_ranks":
                pairs = zip(loop_ranks(hps), loop_ranks(clip), strict=True)
                expected = loop_group([0.8 * h + 0.2 * c for h, c in pairs], 1, 1e-8)
            else:
                a, b = loop_group(hps, 1, 1e-8), loop_group(clip, 1, 1e-8)
                total = 2.5 if combination == "normalized_weights" else 1.0
                expected = [(2.0 * x + 0.5 * y) / total for x, y in zip(a, b, strict=True)]
            assert found[prompt, group].tolist() == pytest.approx(expected, rel=1e-10)


def test_ranks_share_ties_and_leave_out_absent_rewards() -> None:
    rewards = torch.tensor([[0.3, 0.1, 0.3 + 1e-8, 0.2], [0.7, 0.7, 0.7, 0.7]])
    assert ranks(rewards).tolist() == [[3.5, 1.0, 3.5, 2.0], [2.5, 2.5, 2.5, 2.5]]
    present = torch.tensor([True, True, False, True])
    assert ranks(rewards, present)[:, present].tolist() == [[3.0, 1.0, 2.0], [2.0, 2.0, 2.0]]


def test_mean_of_ranks_ignores_the_scale_of_a_reward() -> None:
    config = AdvantageConfig(combination="mean_of_ranks")
    stretched = {"hps": 3 * REWARDS["hps"], "clip": (REWARDS["clip"] / 32).sinh()}
    one, two = (group_advantages(rewards, WEIGHTS, config)[0] for rewards in (REWARDS, stretched))
    assert torch.equal(one, two)
    equal = {name: torch.full((1, 1, 4), 0.3) for name in WEIGHTS}
    assert group_advantages(equal, WEIGHTS, config)[0].eq(0).all()


def test_equal_groups_are_counted_per_reward() -> None:
    rewards = {name: values.clone() for name, values in REWARDS.items()}
    rewards["hps"][0, 1] = 0.3
    rewards["hps"][1, 2] = 0.3
    found, zero_std_groups = group_advantages(rewards, WEIGHTS, AdvantageConfig())
    assert zero_std_groups == {"hps": 2, "clip": 0}
    clip_alone = loop_group(rewards["clip"][0, 1].tolist(), 1, 1e-8)
    assert found[0, 1].tolist() == pytest.approx([0.5 * a for a in clip_alone], rel=1e-10)


def test_step_advantages_sum_granularities_and_rewards_then_clamp() -> None:
    groups = [
        Group((0, 1, 2, 3, 4, 5), step=0, granularity=1),
        Group((0, 1, 2, 3, 4, 5), step=0, granularity=2),
        Group((0, 1, 2, 3, 4, 5), step=4, granularity=1),
    ]
    weights = {"hps": 1.0, "clip": 1.0}
    values, _ = group_advantages(REWARDS, weights, AdvantageConfig())
    found = step_advantages(values, groups, 0, AdvantageConfig(clip=2.0))
    assert found.shape == (2, 6)
    clipped = 0
    for prompt in range(2):
        lists = [
            loop_group(REWARDS[name][prompt, group].tolist(), 1, 1e-8)
            for name in REWARDS
            for group in (0, 1)
        ]
        for sample in range(6):
            total = math.fsum(values[sample] for values in lists)
            clipped += abs(total) > 2.0
            expected = min(max(total, -2.0), 2.0)
            assert float(found[prompt, sample]) == pytest.approx(expected, rel=1e-10)
    assert 0 < clipped < 12
    at_four = step_advantages(values, groups, 4, AdvantageConfig(clip=5.0))
    torch.testing.assert_close(at_four, values[:, 2])


def test_the_sum_is_clamped_and_a_group_without_a_step_credits_every_step() -> None:
    groups = [Group((0, 1), step=1, granularity=g) for g in (1, 2, 2)]
    values = torch.tensor([[[7.0, -1.0], [-4.0, -2.0], [1.0, -9.0]]], dtype=torch.float64)
    assert step_advantages(values, groups, 1, AdvantageConfig(clip=5.0)).tolist() == [[4.0, -5.0]]
    for step in (0, 7):
        found = step_advantages(values[:, 2:], [Group((0, 1))], step, AdvantageConfig(clip=5.0))
        assert found.tolist() == [[1.0, -5.0]]


# --- reduction of a step's granularities ---------------------------------------------------------

STEPS = (0, 2)
GRANULAR = [Group((), step, granularity) for step in STEPS for granularity in (1, 2, 3)]
RULES: tuple[GranularityReduction, ...] = (
    "sum", "mean", "inverse_variance", "best_of", "reward_mean",
)  # fmt: skip


def granular_rewards(seed: int) -> dict[str, torch.Tensor]:
    spread = torch.tensor([0.01, 0.05, 0.2]).repeat(2).view(1, 6, 1)
    return {
        name: 0.3 + spread * 50 * (random_rewards(2, 6, 6, seed=seed + place) - 0.25)
        for place, name in enumerate(WEIGHTS)
    }


def loop_reduction(rows: list[list[float]], rule: GranularityReduction) -> list[float]:
    """One reward at one step of one prompt: rows are its granularities."""
    samples = list(zip(*rows, strict=True))
    if rule == "best_of":
        return loop_group([max(values) for values in samples], 1, 1e-8)
    if rule == "reward_mean":
        return loop_group([math.fsum(values) / len(values) for values in samples], 1, 1e-8)
    if rule == "inverse_variance":
        inverse = [1 / loop_std(row, 1) ** 2 for row in rows]
        weights = [len(rows) * one / math.fsum(inverse) for one in inverse]
    else:
        weights = [1.0 if rule == "sum" else 1 / len(rows)] * len(rows)
    advantages = zip(*(loop_group(row, 1, 1e-8) for row in rows), strict=True)
    return [math.fsum(w * a for w, a in zip(weights, each, strict=True)) for each in advantages]


@pytest.mark.parametrize("rule", RULES)
def test_every_reduction_equals_its_loop(rule: GranularityReduction) -> None:
    rewards = granular_rewards(seed=3)
    config = AdvantageConfig(granularity_reduction=rule, clip=1e9)
    found = transition_advantages(rewards, WEIGHTS, GRANULAR, STEPS, config)
    for place, by_step in enumerate(found.by_step):
        for prompt in range(2):
            expected = [0.0] * 6
            for name, weight in WEIGHTS.items():
                rows = rewards[name][prompt, 3 * place : 3 * place + 3].double().tolist()
                reduced = loop_reduction(rows, rule)
                expected = [e + weight * a for e, a in zip(expected, reduced, strict=True)]
            assert by_step[prompt].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_granularity_whose_rewards_are_equal_has_no_weight() -> None:
    rewards = {"hps": granular_rewards(seed=5)["hps"]}
    rewards["hps"][0, 1] = 0.3  # would have an infinite precision
    config = AdvantageConfig(granularity_reduction="inverse_variance", clip=1e9)
    result = transition_advantages(rewards, {"hps": 1.0}, GRANULAR, STEPS, config)
    first, _, third = rewards["hps"][0, :3].double().tolist()
    expected = [1.5 * a for a in loop_reduction([first, third], "inverse_variance")]
    assert result.by_step[0][0].tolist() == pytest.approx(expected, rel=1e-9)
    assert result.zero_std_groups == {"hps": 1}
    rewards["hps"][0, :3] = 0.3
    result = transition_advantages(rewards, {"hps": 1.0}, GRANULAR, STEPS, config)
    assert result.by_step[0][0].eq(0).all()


@pytest.mark.parametrize("combination", ["sum_of_rewards", "normalized_weights", "mean_of_ranks"])
@pytest.mark.parametrize("rule", RULES[1:])
def test_one_granularity_is_the_same_under_every_rule(
    rule: GranularityReduction, combination: str
) -> None:
    groups = [Group((), 0, 1), Group((), 2, 1)]
    rewards = {name: values[:, :2] for name, values in granular_rewards(seed=2).items()}
    before, after = (
        transition_advantages(
            rewards,
            WEIGHTS,
            groups,
            STEPS,
            AdvantageConfig(combination=combination, granularity_reduction=one),
        )
        for one in ("sum", rule)
    )
    for one, two in zip(before.by_step, after.by_step, strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["mean", "best_of"])
def test_a_group_that_credits_every_step_is_left_alone(rule: GranularityReduction) -> None:
    rewards = {"hps": granular_rewards(seed=4)["hps"][:, :1]}
    config = AdvantageConfig(granularity_reduction=rule)
    result = transition_advantages(rewards, {"hps": 1.0}, [Group(())], (0, 1, 5), config)
    plain = group_advantages(rewards, {"hps": 1.0}, AdvantageConfig())[0][:, 0]
    assert all(torch.allclose(values, plain.clamp(-5, 5)) for values in result.by_step)


def test_the_default_rule_is_not_in_the_hashed_configuration() -> None:
    assert "granularity_reduction" not in AdvantageConfig().model_dump(mode="json")
    assert not {"whiten", "trimmed_ratio"} & AdvantageConfig().model_dump(mode="json").keys()
    other = AdvantageConfig(granularity_reduction="mean").model_dump(mode="json")
    assert other["granularity_reduction"] == "mean"
