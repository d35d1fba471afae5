"""BranchGRPO: its counts, its advantages against an explicit tree, and what it prunes."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from g2rpo.flow.rollout_tree import RolloutTree, recorded_steps
from g2rpo.flow.schedule import shifted_sigmas
from g2rpo.methods.base import RolloutShape
from g2rpo.methods.branch_grpo import BranchGRPO
from g2rpo.training.advantages import (
    AdvantageConfig,
    GranularityReduction,
    TransitionAdvantages,
    member_means,
    transition_advantages,
)
from g2rpo.training.config import TrainConfig

RELEASED = RolloutShape(steps=20, group_size=16, iterations=300)


def width(splits: tuple[int, ...], depth: int) -> int:
    """Nodes at a depth: doubled by each split step that is passed."""
    return int(2 ** sum(step < depth for step in splits))


@pytest.mark.parametrize(
    ("steps", "splits"), [(20, (0, 3, 6, 9)), (10, (0, 2, 4)), (6, (0, 1)), (3, (0,))]
)
def test_transitions_and_evaluations_are_those_of_the_closed_form(
    steps: int, splits: tuple[int, ...]
) -> None:
    shape = RolloutShape(steps, 2 ** len(splits), 10)
    tree = BranchGRPO(split_steps=splits).rollout_tree(shape, 0)
    assert len(tree.recorded) == sum(width(splits, depth) for depth in range(1, steps + 1))
    assert tree.velocity_evaluations == sum(width(splits, depth) for depth in range(steps))
    assert len(tree.images) == shape.group_size
    # No two transitions have one noise.
    noises = {(tree.states[i].node, tree.states[i].sample) for i in tree.recorded}
    assert len(noises) == len(tree.recorded)


def test_the_released_tree_has_218_transitions_of_203_evaluations() -> None:
    for splits in ((0, 3, 6, 9), None):
        tree = BranchGRPO(split_steps=splits).rollout_tree(RELEASED, 0)
        assert (len(tree.recorded), tree.velocity_evaluations) == (218, 203)
        assert len(tree.images) == 16


@pytest.mark.parametrize(
    ("steps", "size", "splits"),
    [(10, 8, (0, 2, 4)), (16, 16, (0, 2, 4, 7)), (4, 4, (0, 1)), (2, 2, (0,))],
)
def test_default_splits_spread_over_the_first_half(
    steps: int, size: int, splits: tuple[int, ...]
) -> None:
    assert BranchGRPO().splits(RolloutShape(steps, size, 1)) == splits


def test_a_trunk_before_the_first_split_is_not_trained() -> None:
    tree = BranchGRPO(split_steps=(2, 3)).rollout_tree(RolloutShape(6, 4, 1), 0)
    assert recorded_steps(tree) == [2, 3, 4, 5]
    assert len(tree.recorded) == 2 + 4 * 3


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"split_steps": (0, 3)}, (20, 8), r"group_size=8 is not the 4 leaves.*group_size=4"),
        ({}, (20, 12), "group_size=12 is not a power of two.*; use 8 or 16"),
        ({}, (4, 8), "grid.steps=4 is too short for 3 splits"),
        ({"split_steps": (0, 19)}, (20, 4), "split_steps: step 19 is out of range; use 0 to 18"),
        ({"pruned_depths": (0,)}, (6, 4), "pruned_depths: 0 is out of range; use 1 to 6"),
        ({"pruned_depths": (1, 2)}, (2, 2), "pruned_depths leaves nothing to train"),
        ({"kernel": "cps"}, (6, 4), "no noise at the last step; add 6 to method.pruned_depths"),
        (
            {"kernel": "cps", "pruned_depths": (6,), "pruning_interval": 3},
            (6, 4),
            "pruning_interval needs",
        ),
    ],
)
def test_impossible_trees_are_refused(
    settings: dict[str, Any], shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        BranchGRPO(**settings).check(RolloutShape(*shape, 10))
    assert "\n" not in str(caught.value)


def test_a_scale_needs_to_know_its_steps() -> None:
    for settings in ({}, {"split_steps": (0,), "kernel": "cps"}):
        with pytest.raises(ValidationError, match="split_noise_scale needs"):
            BranchGRPO(split_noise_scale=4.0, **settings)  # type: ignore[arg-type]


def test_the_scale_is_in_the_std_of_split_steps_alone() -> None:
    sigmas = shifted_sigmas(6, 3.0)
    plain = BranchGRPO(split_steps=(0, 2)).transitions(sigmas)
    scaled = BranchGRPO(split_steps=(0, 2), split_noise_scale=4.0).transitions(sigmas)
    for step, (one, other) in enumerate(zip(plain, scaled, strict=True)):
        assert one.std == 0.3 * math.sqrt(sigmas[step] - sigmas[step + 1])
        assert other.std == (4 if step in (0, 2) else 1) * one.std
        assert one.latents_weight == other.latents_weight
        assert one.velocity_weight == other.velocity_weight


# --- pruning -------------------------------------------------------------------------------------


def test_pruned_depths_are_sampled_and_not_trained() -> None:
    whole = BranchGRPO().rollout_tree(RELEASED, 0)
    pruned = BranchGRPO(pruned_depths=(15, 16, 17, 18, 19)).rollout_tree(RELEASED, 0)
    assert pruned.velocity_evaluations == whole.velocity_evaluations
    assert len(pruned.images) == 16
    assert len(pruned.recorded) == 218 - 5 * 16  # 8.625 of 16 samples each, as its README says
    assert set(recorded_steps(whole)) - set(recorded_steps(pruned)) == set(range(14, 19))


def test_pruned_depths_slide_to_the_last_split() -> None:
    method = BranchGRPO(pruned_depths=(16, 15), pruning_interval=30)
    for iteration in range(300):
        shift = min((iteration + 1) // 30, 15 - 9)
        assert method.phase(RELEASED, iteration) == (15 - shift, 16 - shift)
    assert BranchGRPO(pruned_depths=(16, 15)).phase(RELEASED, 299) == (15, 16)


@pytest.mark.parametrize(("share", "best", "worst"), [(0.5, 4, 4), (0.3, 2, 2), (0.01, 1, 1)])
def test_the_best_and_worst_leaves_are_trained_after_the_last_split(
    share: float, best: int, worst: int
) -> None:
    method = BranchGRPO(trained_leaves=share)
    generator = torch.Generator().manual_seed(4)
    advantages = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    assert method.selected(RELEASED, 9, advantages) is None
    found = method.selected(RELEASED, 10, advantages)
    assert found is not None
    for row, values in zip(found.tolist(), advantages.tolist(), strict=True):
        ranked = sorted(range(16), key=lambda leaf: -values[leaf])
        kept = {leaf for leaf, chosen in enumerate(row) if chosen}
        assert kept == {*ranked[:best], *ranked[-worst:]}
    everything = BranchGRPO(trained_leaves=1.0).selected(RELEASED, 10, advantages)
    assert everything is not None and everything.all()
    equal = method.selected(RELEASED, 10, torch.zeros(1, 16))
    assert equal is not None and int(equal.sum()) == best + worst


# --- advantages against an explicit tree ---------------------------------------------------------


@dataclass
class Node:
    depth: int
    first: int
    """Its first leaf."""
    children: list["Node"] = field(default_factory=list)
    reward: float = 0.0
    advantage: float = 0.0

    def leaves(self) -> list["Node"]:
        return [leaf for child in self.children for leaf in child.leaves()] or [self]

    def all(self) -> list["Node"]:
        return [self, *(node for child in self.children for node in child.all())]


def grown(steps: int, splits: tuple[int, ...], size: int) -> Node:
    """The tree, built node by node."""

    def grow(depth: int, first: int, below: int) -> Node:
        node = Node(depth, first)
        if depth < steps:
            half = below // 2
            starts = [(first, half), (first + half, half)] if depth in splits else [(first, below)]
            node.children = [grow(depth + 1, *start) for start in starts]
        return node

    return grow(0, 0, size)


def with_rewards(root: Node, rewards: list[float]) -> Node:
    for leaf, reward in zip(root.leaves(), rewards, strict=True):
        leaf.reward = reward
    for node in root.all():
        leaves = [leaf.reward for leaf in node.leaves()]
        node.reward = math.fsum(leaves) / len(leaves)
    return root


def std_of(values: list[float], ddof: int = 1) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof))


def depth_of(root: Node, depth: int) -> list[Node]:
    return [node for node in root.all() if node.depth == depth]


STEPS, SPLITS, SIZE, PROMPTS = 6, (0, 2, 3), 8, 3
SHAPE = RolloutShape(STEPS, SIZE, 10)


def tree_of_test() -> RolloutTree:
    return BranchGRPO(split_steps=SPLITS).rollout_tree(SHAPE, 0)


def leaf_rewards(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.25 + 0.02 * torch.randn(PROMPTS, SIZE, generator=generator)


def advantages_of(
    rewards: dict[str, torch.Tensor], config: AdvantageConfig, weights: dict[str, float]
) -> TransitionAdvantages:
    groups = tree_of_test().groups
    assert [group.step for group in groups] == list(range(STEPS))
    grouped = {
        name: member_means(values[:, None].repeat(1, STEPS, 1), groups)
        for name, values in rewards.items()
    }
    return transition_advantages(grouped, weights, groups, range(STEPS), config)


def compare(found: TransitionAdvantages, roots: list[Node]) -> None:
    for prompt, root in enumerate(roots):
        for step, values in enumerate(found.by_step):
            for node in depth_of(root, step + 1):
                value = float(values[prompt, node.first])
                assert value == pytest.approx(node.advantage, rel=1e-10, abs=1e-10)


def roots_of(rewards: torch.Tensor) -> list[Node]:
    return [with_rewards(grown(STEPS, SPLITS, SIZE), row) for row in rewards.double().tolist()]


def test_advantages_are_normalised_per_tree_and_depth() -> None:
    rewards = leaf_rewards(1)
    rewards[1] = 0.2763  # equal: no advantage at any depth
    roots = roots_of(rewards)
    for root in (roots[0], roots[2]):
        for depth in range(1, STEPS + 1):
            nodes = depth_of(root, depth)
            values = [node.reward for node in nodes]
            for node in nodes:
                mean = math.fsum(values) / len(values)
                node.advantage = (node.reward - mean) / (std_of(values) + 1e-8)
    found = advantages_of({"hps": rewards}, AdvantageConfig(), {"hps": 1.0})
    compare(found, roots)
    assert found.zero_std_groups == {"hps": STEPS}
    assert abs(float(found.by_step[0][0, 0])) == pytest.approx(math.sqrt(0.5), abs=1e-4)


def test_several_rewards_are_summed_and_clamped() -> None:
    first, second = leaf_rewards(2), leaf_rewards(3)
    roots, others = roots_of(first), roots_of(second)
    for root, other in zip(roots, others, strict=True):
        for depth in range(1, STEPS + 1):
            one, two = depth_of(root, depth), depth_of(other, depth)
            terms = []
            for nodes, weight in ((one, 2.0), (two, 0.5)):
                values = [node.reward for node in nodes]
                mean, std = math.fsum(values) / len(values), std_of(values, 0)
                terms.append([weight * (v - mean) / (std + 1e-4) for v in values])
            for node, a, b in zip(one, *terms, strict=True):
                node.advantage = min(max(a + b, -1.5), 1.5)
    config = AdvantageConfig(ddof=0, epsilon=1e-4, clip=1.5)
    found = advantages_of({"a": first, "b": second}, config, {"a": 2.0, "b": 0.5})
    compare(found, roots)


def test_the_std_of_everything_is_that_of_all_nodes() -> None:
    rewards = leaf_rewards(5)
    roots = roots_of(rewards)
    everything = [n.reward for root in roots for n in root.all() if n.depth > 0]
    for root in roots:
        for depth in range(1, STEPS + 1):
            nodes = depth_of(root, depth)
            mean = math.fsum(node.reward for node in nodes) / len(nodes)
            for node in nodes:
                node.advantage = (node.reward - mean) / (std_of(everything) + 1e-8)
    config = AdvantageConfig(normalizer="global_std")
    compare(advantages_of({"hps": rewards}, config, {"hps": 1.0}), roots)


def test_whitening_is_over_the_nodes_of_a_step() -> None:
    rewards = leaf_rewards(6)
    roots = roots_of(rewards)
    for depth in range(1, STEPS + 1):
        flat: list[float] = []
        for root in roots:
            nodes = depth_of(root, depth)
            values = [node.reward for node in nodes]
            mean = math.fsum(values) / len(values)
            flat += [(v - mean) / (std_of(values) + 1e-8) for v in values]
        center, scale = math.fsum(flat) / len(flat), std_of(flat) + 1e-8
        for node in (node for root in roots for node in depth_of(root, depth)):
            node.advantage = (flat.pop(0) - center) / scale
    config = AdvantageConfig(whiten=True)
    compare(advantages_of({"hps": rewards}, config, {"hps": 1.0}), roots)


@pytest.mark.parametrize("rule", ["mean", "inverse_variance", "best_of", "reward_mean"])
def test_a_step_has_one_group_so_every_reduction_is_the_same(rule: GranularityReduction) -> None:
    rewards = {"hps": leaf_rewards(7)}
    plain = advantages_of(rewards, AdvantageConfig(), {"hps": 1.0})
    other = advantages_of(rewards, AdvantageConfig(granularity_reduction=rule), {"hps": 1.0})
    for one, two, group in zip(plain.by_step, other.by_step, tree_of_test().groups, strict=True):
        torch.testing.assert_close(one[:, :: group.share], two[:, :: group.share])


def config(**changes: Any) -> TrainConfig:
    data = {
        "policy": {"source": "nowhere", "resolution": 720},
        "prompts": {"file": "nowhere.txt"},
        "rewards": {"hps": {"reward": {"model": "hps"}}},
        "grid": {"steps": 16},
        "method": {"name": "branch_grpo"},
        "rollout": {"group_size": 8},
    }
    return TrainConfig.model_validate(data | changes)


def test_trimming_is_refused() -> None:
    config()
    with pytest.raises(ValidationError, match="trimmed_ratio is not supported with branch_grpo"):
        config(advantage={"trimmed_ratio": 0.25})


@pytest.mark.parametrize(
    ("updates", "pruning", "iteration"),
    [
        # Splits at 0, 3 and 6: sample 1 has a node of its own from depth 7 on.
        (8, {}, None),
        (8, {"pruned_depths": range(8, 17)}, None),
        (8, {"pruned_depths": range(7, 17)}, 1),
        (4, {"pruned_depths": range(7, 17)}, None),
        # Of the depths after 7, only the chosen leaves are trained, which depend on rewards.
        (8, {"trained_leaves": 0.25}, None),
        (8, {"pruned_depths": [7]}, None),
        (8, {"trained_leaves": 0.25, "pruned_depths": [7]}, 1),
        (8, {"trained_leaves": 1.0, "pruned_depths": [7]}, None),
        # The pruned depth is 7 after two intervals, of iterations counted from 1.
        (8, {"trained_leaves": 0.25, "pruned_depths": [9], "pruning_interval": 2}, 4),
    ],
)
def test_every_update_has_something_to_train_whatever_the_rewards(
    updates: int, pruning: dict[str, Any], iteration: int | None
) -> None:
    method = {"name": "branch_grpo", "split_steps": [0, 3, 6], **pruning}
    optimization = {"updates_per_iteration": updates, "iterations": 20}
    if iteration is None:
        config(method=method, optimization=optimization)
        return
    message = f"{updates}: an update of iteration {iteration} may have no transition to train; use"
    with pytest.raises(ValidationError, match=message):
        config(method=method, optimization=optimization)
