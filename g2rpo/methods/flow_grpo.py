"""Flow-GRPO: noise at every step, all but the last trained (arXiv 2505.05470)."""

from typing import Literal

from g2rpo.flow.rollout_tree import Group, RolloutTree
from g2rpo.methods.base import Method, RolloutShape


class FlowGRPO(Method):
    """G trajectories, all steps stochastic in the Flow form; the image is the final x."""

    name: Literal["flow_grpo"] = "flow_grpo"
    shared_initial_noise: bool = True
    """The released code draws initial noise per sample; the matched comparison shares it."""

    def tree(self, shape: RolloutShape, phase: int = 0) -> RolloutTree:
        """G stochastic trajectories to the image, which includes the last step's noise."""
        tree = RolloutTree(shape.steps)
        starts = tree.initial_group(shape.group_size, shared=self.shared_initial_noise)
        steps = range(shape.steps)
        tree.groups.append(Group(tree.trajectories(starts, steps, steps[:-1])))
        return tree
