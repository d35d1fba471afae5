"""TempFlow-GRPO: branches of one trunk, weighted by the noise of their step (arXiv 2508.04324)."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from g2rpo.flow.rollout_tree import RolloutTree
from g2rpo.flow.transition import Transition
from g2rpo.methods.base import Method, RolloutShape
from g2rpo.methods.g2rpo import G2RPO, Branches, named_steps


class TempFlowGRPO(Method):
    """One deterministic trunk per prompt, and G branches with noise at each step but the last.

    Each branch is finished by ODE without strides, and each step has a group of its own: the
    rollout of :class:`G2RPO` without multi-granularity advantages.
    """

    transition_settings = ("weight_scale",)

    name: Literal["tempflow_grpo"] = "tempflow_grpo"
    weight_scale: float | None = Field(None, gt=0)
    """The loss of a step is weighted by this times the std of its noise (released: 2.25 for SD3.5,
    1.73 for FLUX); null makes the mean weight of an iteration's steps 1, as those do."""

    def tree(self, shape: RolloutShape, phase: int = 0) -> RolloutTree:
        """The trunk, its branches and their continuations."""
        branches = Branches(named_steps("all", shape.steps), granularities=(1,))
        return G2RPO(log_anchor_reward=False).tree(shape, branches)

    def step_weights(self, laws: Sequence[Transition]) -> tuple[float, ...]:
        """The scale times the std of each step."""
        stds = [law.std for law in laws]
        scale = len(stds) / sum(stds) if self.weight_scale is None else self.weight_scale
        return tuple(scale * std for std in stds)
