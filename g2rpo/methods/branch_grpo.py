"""BranchGRPO: one tree of noisy steps per prompt, which splits in two (arXiv 2509.06040)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from g2rpo.flow.rollout_tree import Group, RolloutTree
from g2rpo.flow.transition import Transition, constant_diffusion
from g2rpo.methods.adaptive import Measurements
from g2rpo.methods.base import Method, RolloutShape, check_steps


class BranchGRPO(Method):
    """A tree from one initial noise: each state has two children at a split step, else one.

    All steps are stochastic with constant g = eta, as DanceGRPO's. A node's reward is the mean of
    those of its leaves, of which there are G, and the nodes of one depth form the group of the step
    that leads to them. A leaf's image is the x_0 prediction of its last step, whose transition is
    trained all the same.
    """

    transition_settings = ("trained_leaves",)

    name: Literal["branch_grpo"] = "branch_grpo"
    eta: float = Field(0.3, gt=0)
    """The constant diffusion coefficient (released flag ``--eta 0.3``)."""
    split_steps: tuple[int, ...] | None = None
    """The steps that split (released flag ``--tree_split_points 0,3,6,9`` of 20 steps); null
    spreads log2(G) of them in the same way over the first half."""
    split_noise_scale: float = Field(1.0, gt=0)
    """Multiplies the noise of the split steps, and the std in their log-prob."""
    pruned_depths: tuple[int, ...] = ()
    """The transitions that reach these nodes, 1 to T, are not trained (``--depth_pruning``)."""
    pruning_interval: int | None = Field(None, ge=1)
    """Every this many iterations the pruned depths move one step towards the noise, until the first
    is the last split step (``--depth_pruning_slide_interval 30``); null keeps them."""
    trained_leaves: float | None = Field(None, gt=0, le=1)
    """After the last split, trains this share of a prompt's leaves alone, half of them the best and
    half the worst (``--width_pruning_mode 2 --width_pruning_ratio``); null trains all."""

    @model_validator(mode="after")
    def _scaled(self) -> Self:
        if self.split_noise_scale != 1 and (self.split_steps is None or self.kernel != "sde"):
            raise ValueError("method.split_noise_scale needs method.split_steps and kernel sde")
        return self

    def splits(self, shape: RolloutShape) -> tuple[int, ...]:
        """The split steps, ascending.

        Raises:
            ValueError: one line; the group is not the leaves of a tree with them.
        """
        size, last = shape.group_size, shape.steps // 2 - 1
        rounds = size.bit_length() - 1
        if self.split_steps is not None:
            check_steps("method.split_steps", self.split_steps, shape.steps - 2)
            leaves = 2 ** len(self.split_steps)
            if leaves != size:
                raise ValueError(
                    f"rollout.group_size={size} is not the {leaves} leaves of method.split_steps="
                    f"{list(self.split_steps)}; use rollout.group_size={leaves}"
                )
            return tuple(sorted(self.split_steps))
        if 2**rounds != size:
            raise ValueError(
                f"rollout.group_size={size} is not a power of two, as the leaves of "
                f"{self.name} are; use {2**rounds} or {2 ** (rounds + 1)}"
            )
        if rounds > max(last + 1, 1):
            raise ValueError(
                f"grid.steps={shape.steps} is too short for {rounds} splits in its first half; "
                "use more steps or give method.split_steps"
            )
        return tuple(i * last // max(rounds - 1, 1) for i in range(rounds))

    def check(self, shape: RolloutShape) -> list[str]:
        depths = set(range(self.splits(shape)[0] + 1, shape.steps + 1))
        if wrong := set(self.pruned_depths) - set(range(1, shape.steps + 1)):
            raise ValueError(
                f"method.pruned_depths: {min(wrong)} is out of range; use 1 to {shape.steps}"
            )
        if not depths - set(self.pruned_depths):
            raise ValueError("method.pruned_depths leaves nothing to train; prune fewer depths")
        if self.kernel == "cps" and shape.steps not in self.pruned_depths:
            raise ValueError(
                f"method.kernel=cps has no noise at the last step; add {shape.steps} to "
                "method.pruned_depths"
            )
        if self.kernel == "cps" and self.pruning_interval is not None:
            raise ValueError("method.pruning_interval needs method.kernel: sde")
        return []

    def diffusion(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """Constant: eta."""
        return constant_diffusion(self.eta, sigmas)

    def transitions(self, sigmas: Sequence[float]) -> tuple[Transition, ...]:
        """See :meth:`Method.transitions`, with the scale of the split steps."""
        laws = list(super().transitions(sigmas))
        if self.split_noise_scale != 1:
            for step in self.split_steps or ():
                laws[step] = replace(laws[step], noise_scale=self.split_noise_scale)
        return tuple(laws)

    def phase(
        self, shape: RolloutShape, iteration: int, measurements: Measurements | None = None
    ) -> tuple[int, ...]:
        """The pruned depths of ``iteration``."""
        depths = tuple(sorted(self.pruned_depths))
        if not depths or self.pruning_interval is None:
            return depths
        # The released code counts its iterations from 1.
        most = max(0, depths[0] - self.splits(shape)[-1])
        moved = min((iteration + 1) // self.pruning_interval, most)
        return tuple(depth - moved for depth in depths)

    def tree(self, shape: RolloutShape, phase: tuple[int, ...]) -> RolloutTree:
        """The tree; each state is driven by the noise of the first of its leaves."""
        tree, splits = RolloutTree(shape.steps), self.splits(shape)
        states, share = {0: tree.initial(sample=0)}, shape.group_size
        images: tuple[int, ...] = ()
        trained = []
        for step in range(shape.steps):
            if step == shape.steps - 1:
                images = tuple(tree.ode(state, shape.steps) for state in states.values())
            share //= 2 if step in splits else 1
            # A node that is alone at its depth has no advantage.
            record = share < shape.group_size and step + 1 not in phase
            if record:
                trained.append((step, share))
            elif images:
                break
            states = {
                child: tree.sde(source, child, record=record)
                for first, source in states.items()
                for child in ([first, first + share] if step in splits else [first])
            }
        tree.groups = [Group(images, step, share=share) for step, share in trained]
        return tree

    def selected(self, shape: RolloutShape, step: int, advantages: Tensor) -> Tensor | None:
        """See :meth:`Method.selected`: the best and the worst leaves after the last split."""
        if self.trained_leaves is None or step <= self.splits(shape)[-1]:
            return None
        count = max(2, int(shape.group_size * self.trained_leaves))
        order = advantages.argsort(dim=1, descending=True, stable=True)
        places = torch.tensor([*range(count // 2), *range(count // 2 - count, 0)])
        return torch.zeros_like(advantages, dtype=torch.bool).scatter_(1, order[:, places], True)
