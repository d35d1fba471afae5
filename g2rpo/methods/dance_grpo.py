"""DanceGRPO: noise at every step, a random subset of steps trained (arXiv 2505.07818)."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from g2rpo.flow.rollout_tree import Group, RolloutTree
from g2rpo.flow.transition import constant_diffusion
from g2rpo.methods.base import Method, RolloutShape
from g2rpo.seeds import permutation


class DanceGRPO(Method):
    """G trajectories from shared initial noise, all steps stochastic with constant g = eta.

    The last step's x_0 prediction is rewarded; the last transition is never trained.
    """

    name: Literal["dance_grpo"] = "dance_grpo"
    eta: float = Field(0.3, gt=0)
    """The constant diffusion coefficient (released flag ``--eta 0.3``)."""
    trained_fraction: float = Field(0.6, gt=0, le=1)
    """int((T - 1) * fraction) steps are trained (released flag ``--timestep_fraction 0.6``); an
    objective on the forward process does not use it."""

    def trained_count(self, steps: int) -> int:
        """How many of the first T - 1 steps each sample trains."""
        return int((steps - 1) * self.trained_fraction)

    def check(self, shape: RolloutShape) -> list[str]:
        if self.trained_count(shape.steps) < 1:
            raise ValueError(
                f"method.trained_fraction={self.trained_fraction} trains none of the "
                f"{shape.steps - 1} trainable steps; increase it"
            )
        return []

    def diffusion(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """Constant: eta."""
        return constant_diffusion(self.eta, sigmas)

    def tree(self, shape: RolloutShape, phase: int = 0) -> RolloutTree:
        """G stochastic lines; the image is x_0 predicted from the last node's state."""
        tree = RolloutTree(shape.steps)
        starts = tree.initial_group(shape.group_size, shared=True)
        stochastic = range(shape.steps - 1)
        tree.groups.append(Group(tree.trajectories(starts, stochastic, stochastic)))
        return tree

    def trained_steps(
        self, recorded: Sequence[int], seed: int, iteration: int, key: tuple[str, int]
    ) -> Sequence[int]:
        """A new random subset of the recorded steps for each sample."""
        order = permutation(len(recorded), seed, "trained-steps", iteration, *key)
        return sorted(recorded[index] for index in order[: self.trained_count(len(recorded) + 1)])
