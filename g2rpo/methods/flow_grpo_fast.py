"""Flow-GRPO-Fast: noise at a few early steps, drawn anew in each iteration (arXiv 2505.05470)."""

from typing import Literal

from pydantic import Field

from g2rpo.flow.rollout_tree import Group, RolloutTree
from g2rpo.methods.adaptive import Measurements
from g2rpo.methods.base import Method, RolloutShape
from g2rpo.seeds import permutation


class FlowGRPOFast(Method):
    """G trajectories, stochastic and trained at a few steps of the first half of the grid.

    The steps are the same for all prompts of an iteration, and ODE steps surround them.
    """

    name: Literal["flow_grpo_fast"] = "flow_grpo_fast"
    stochastic_count: int = Field(3, ge=1)
    """Stochastic steps of an iteration (the released code's ``sde_window_size``)."""
    contiguous: bool = True
    """A window of consecutive steps with a random start; false draws the steps one by one."""
    among: int | None = Field(None, ge=1)
    """They are among the first ``among`` steps; null is half of the grid, as released."""
    shared_initial_noise: bool = True
    """The released code draws initial noise per sample; the matched comparison shares it."""

    def steps_to_draw_from(self, shape: RolloutShape) -> int:
        """The number of first steps among which the stochastic ones are."""
        return shape.steps // 2 if self.among is None else self.among

    def check(self, shape: RolloutShape) -> list[str]:
        among = self.steps_to_draw_from(shape)
        if among > shape.steps - 1:
            raise ValueError(
                f"method.among={among}: the last of {shape.steps} steps is not trained"
            )
        if self.stochastic_count > among:
            raise ValueError(
                f"method.stochastic_count={self.stochastic_count} is more than the first {among} "
                "steps to draw from; use fewer, or raise method.among or grid.steps"
            )
        return []

    def phase(
        self, shape: RolloutShape, iteration: int, measurements: Measurements | None = None
    ) -> tuple[int, ...]:
        """The stochastic steps of ``iteration``, ascending."""
        among, count = self.steps_to_draw_from(shape), self.stochastic_count
        if self.contiguous:
            start = permutation(among - count + 1, shape.seed, "window-start", iteration)[0]
            return tuple(range(start, start + count))
        order = permutation(among, shape.seed, "stochastic-steps", iteration)
        return tuple(sorted(order[:count]))

    def tree(self, shape: RolloutShape, phase: tuple[int, ...]) -> RolloutTree:
        """SDE at the steps of ``phase``, ODE at the others; the image is the final x."""
        tree = RolloutTree(shape.steps)
        starts = tree.initial_group(shape.group_size, shared=self.shared_initial_noise)
        tree.groups.append(Group(tree.trajectories(starts, phase, phase)))
        return tree
