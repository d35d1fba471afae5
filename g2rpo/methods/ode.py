"""Images of ODE trajectories alone, for objectives on the forward process."""

from typing import Literal

from g2rpo.flow.rollout_tree import Group, RolloutTree
from g2rpo.methods.base import Method, RolloutShape


class ODE(Method):
    """G deterministic trajectories from different noise; no step is stochastic."""

    records_transitions = False

    name: Literal["ode"] = "ode"
    solver: Literal["euler", "dpm2m"] = "euler"
    """``dpm2m``: DPM-Solver++ 2M, whose first and last step are of first order."""

    def tree(self, shape: RolloutShape, phase: int = 0) -> RolloutTree:
        """An ODE trajectory from the initial noise of each sample."""
        tree = RolloutTree(shape.steps)
        starts = tree.initial_group(shape.group_size, shared=False)
        walk = tree.follow if self.solver == "euler" else tree.solve
        tree.groups.append(Group(tuple(walk(s, tuple(range(1, shape.steps))) for s in starts)))
        return tree
