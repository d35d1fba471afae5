"""MixGRPO and its Flash variants: noise in a window of steps, ODE outside (arXiv 2507.21802)."""

from typing import Literal, Self

from pydantic import Field

from g2rpo.config import unhashed
from g2rpo.flow.rollout_tree import Group, RolloutTree
from g2rpo.methods.adaptive import Measurements
from g2rpo.methods.base import Method, RolloutShape


class MixGRPO(Method):
    """G trajectories from shared initial noise, stochastic and trained in the window only.

    The window is [c, min(c + size, T - 2)); c starts at 0, moves by ``stride`` every ``interval``
    iterations, and returns to 0 after the last trainable step.
    """

    name: Literal["mix_grpo"] = "mix_grpo"
    window_size: int = Field(4, ge=1)
    """Steps in the window."""
    stride: int = Field(1, ge=0)
    """How far the window moves; 0 keeps it frozen at the first steps."""
    interval: int | None = Field(25, ge=1)
    """Iterations between two moves; null is a twelfth of the iterations, as 25 is of 300."""
    post_window_ratio: float | None = unhashed(None, gt=0, le=1)
    """MixGRPO-Flash: the share of the nodes after the window that DPM-Solver++ 2M keeps, evenly
    spaced before the time shift (``--dpm_post_compress_ratio``); null walks all by Euler steps."""

    def moves_every(self, shape: RolloutShape) -> int:
        """Iterations between two moves of the window."""
        return max(1, round(shape.iterations / 12)) if self.interval is None else self.interval

    def with_resolved_schedule(self, shape: RolloutShape) -> Self:
        """See :meth:`Method.with_resolved_schedule`: the interval."""
        return self.model_copy(update={"interval": self.moves_every(shape)})

    def phase(
        self, shape: RolloutShape, iteration: int, measurements: Measurements | None = None
    ) -> int:
        """The first step of the window."""
        # The released schedule never trains the last two transitions. The window starts at 0,
        # stride, 2 stride, ... below that, so the last positions hold fewer steps than the others,
        # and returns to 0 after them; a stride of 0 leaves one position.
        positions = -(-(shape.steps - 2) // self.stride) if self.stride else 1
        return iteration // self.moves_every(shape) % positions * self.stride

    def window(self, shape: RolloutShape, start: int) -> range:
        """The stochastic steps while the window is at ``start``."""
        return range(start, min(start + self.window_size, shape.steps - 2))

    @staticmethod
    def nodes_between(start: int, steps: int, ratio: float) -> list[float]:
        """The nodes on the shortened way from node ``start`` to the image at node ``steps``.

        Both ends count as kept, so n nodes are n - 1 steps; there is at least one step.
        """
        count = max(int((steps - start + 1) * ratio) - 1, 1)
        return [start + i * (steps - start) / count for i in range(1, count)]

    def check(self, shape: RolloutShape) -> list[str]:
        if shape.steps < 3:
            raise ValueError(
                f"grid.steps={shape.steps} leaves MixGRPO no trainable step; use 3 or more"
            )
        if self.window_size > shape.steps - 2:
            note = f"method.window_size={self.window_size} is more than the {shape.steps - 2} steps"
            return [f"{note} that MixGRPO trains, so the window holds all of them"]
        return []

    def tree(self, shape: RolloutShape, phase: int = 0) -> RolloutTree:
        """ODE shared by the group before the window, SDE in it, ODE or solver steps after it."""
        tree = RolloutTree(shape.steps)
        window = self.window(shape, phase)
        starts = tree.initial_group(shape.group_size, shared=True)
        if self.post_window_ratio is None:
            images = tree.trajectories(starts, window, window)
        else:
            after = tree.trajectories(starts, window, window, until=window.stop)
            nodes = self.nodes_between(window.stop, shape.steps, self.post_window_ratio)
            images = tuple(tree.solve(state, nodes) for state in after)
        tree.groups.append(Group(images))
        return tree
