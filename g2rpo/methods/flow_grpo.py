"""Flow-GRPO: noise at every step, all but the last trained (arXiv 2505.05470)."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from g2rpo.flow.rollout_tree import Group, RolloutTree
from g2rpo.flow.transition import flow_diffusion
from g2rpo.methods.base import Method, RolloutShape


class FlowGRPO(Method):
    """G trajectories, all steps stochastic in the Flow form; the image is the final x."""

    name: Literal["flow_grpo"] = "flow_grpo"
    eta: float = Field(0.7, gt=0)
    """Noise level (the released code's ``noise_level 0.7``)."""
    shared_initial_noise: bool = True
    """The released code draws initial noise per sample; the matched comparison shares it."""

    def diffusion(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """Flow form: eta sqrt(sigma / (1 - sigma))."""
        return flow_diffusion(self.eta, sigmas)

    def tree(self, shape: RolloutShape, phase: int = 0) -> RolloutTree:
        """G stochastic trajectories to the image, which includes the last step's noise."""
        tree = RolloutTree(shape.steps)
        if self.shared_initial_noise:
            states = [tree.initial(sample=0)] * shape.group_size
        else:
            states = [tree.initial(sample) for sample in range(shape.group_size)]
        for step in range(shape.steps):
            record = step < shape.steps - 1
            states = [tree.sde(s, sample, record=record) for sample, s in enumerate(states)]
        tree.groups.append(Group(tuple(states)))
        return tree
