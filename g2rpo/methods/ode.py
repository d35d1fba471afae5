"""Images of ODE trajectories alone, for losses that need no log-prob (e.g. arXiv 2509.16117)."""

from typing import Literal

from g2rpo.flow.rollout_tree import Group, RolloutTree
from g2rpo.methods.base import Method, RolloutShape


class ODE(Method):
    """G deterministic trajectories on the grid; nothing is recorded."""

    name: Literal["ode"] = "ode"
    solver: Literal["euler", "dpm2m"] = "euler"
    """``dpm2m``: DPM-Solver++ 2M, whose first and last step are of first order."""
    shared_initial_noise: bool = False
    """One initial noise makes all images of a group equal."""

    def check(self, shape: RolloutShape) -> list[str]:
        """See :meth:`Method.check`."""
        raise ValueError("method ode records no log-prob, and every objective trains on those")

    def tree(self, shape: RolloutShape, phase: int = 0) -> RolloutTree:
        """An ODE trajectory from the initial noise of each sample."""
        tree = RolloutTree(shape.steps)
        starts = tree.initial_group(shape.group_size, shared=self.shared_initial_noise)
        walk = tree.follow if self.solver == "euler" else tree.solve
        tree.groups.append(Group(tuple(walk(s, tuple(range(1, shape.steps))) for s in starts)))
        return tree
