"""G2RPO: singular stochastic sampling and multi-granularity advantages (arXiv 2510.01982)."""

from typing import Any, Literal, NamedTuple, get_args

from pydantic import field_validator

from g2rpo.config import nearest, unhashed
from g2rpo.flow.granularity import coinciding_granularities, continuation_nodes
from g2rpo.flow.rollout_tree import Group, RolloutTree
from g2rpo.methods.adaptive import (
    AdaptiveGranularities,
    AdaptiveSteps,
    Measurement,
    Measurements,
)
from g2rpo.methods.base import Method, RolloutShape, check_steps
from g2rpo.seeds import permutation

NamedSteps = Literal["first_half", "last_half", "all", "every_second", "first", "middle", "last"]
"""Sets of stochastic steps for any grid; the last step is never one of them."""


def named_steps(name: NamedSteps, steps: int) -> tuple[int, ...]:
    """The stochastic steps that ``name`` stands for on a grid of ``steps`` steps."""
    chosen: dict[NamedSteps, range] = {
        "first_half": range(steps // 2),
        "last_half": range(steps // 2, steps - 1),
        "all": range(steps - 1),
        "every_second": range(0, steps - 1, 2),
        "first": range(1),
        "middle": range(steps // 2, steps // 2 + 1),
        "last": range(steps - 2, steps - 1),
    }
    return tuple(chosen[name])


class Branches(NamedTuple):
    """Where an iteration's rollout branches, and how its branches are continued."""

    steps: tuple[int, ...]
    granularities: tuple[int, ...]


class G2RPO(Method):
    """One deterministic anchor per prompt, and G branches with noise at each step of M.

    Every branch is continued by ODE at each granularity, and their advantages are summed.
    """

    name: Literal["g2rpo"] = "g2rpo"
    stochastic_steps: tuple[int, ...] | NamedSteps | None = None
    """The set M of stochastic steps: indices from 0 or a name (:data:`NamedSteps`); null is the
    first half of the grid, as in the paper."""
    granularities: tuple[int, ...] = (1, 2, 3)
    """The set of granularities; (1,) is "without MGAI"."""
    log_anchor_reward: bool = True
    """Also scores the anchor's image, only for the log (as the released code does)."""
    drawn_steps: int | None = unhashed(None, ge=1)
    """Draws this many of the stochastic steps afresh in each iteration; null uses all of them."""
    adaptive_steps: AdaptiveSteps | None = unhashed(None)
    """Chooses some of the stochastic steps by their gradients; null uses all of them."""
    adaptive_granularities: AdaptiveGranularities | None = unhashed(None)
    """Drops granularities that rank images as a coarser one does; null uses all of them."""

    @field_validator("stochastic_steps", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        names = get_args(NamedSteps)
        if isinstance(value, str) and value not in names:
            raise ValueError(
                f"method.stochastic_steps: unknown name {value!r}; {nearest(value, names)} "
                "(or list the steps, e.g. [0, 1, 2])"
            )
        return value

    def steps_of(self, steps: int) -> tuple[int, ...]:
        """The stochastic steps M for a grid of ``steps`` steps."""
        chosen = "first_half" if self.stochastic_steps is None else self.stochastic_steps
        return named_steps(chosen, steps) if isinstance(chosen, str) else chosen

    def check(self, shape: RolloutShape) -> list[str]:
        """See :meth:`Method.check`; the notes name granularities that coincide."""
        chosen = self.steps_of(shape.steps)
        check_steps("method.stochastic_steps", chosen, shape.steps - 2)
        if not self.granularities:
            raise ValueError("method.granularities is empty; give at least one, e.g. [1]")
        if min(self.granularities) < 1:
            raise ValueError(
                f"method.granularities: {min(self.granularities)} is not a stride; use 1 or more"
            )
        self._check_choices(len(chosen))
        return [
            f"at stochastic step {step}, granularities {first} and {second} visit the same nodes; "
            "that trajectory is evaluated once and counts twice in the advantage"
            for step, first, second in coinciding_granularities(
                chosen, self.granularities, shape.steps
            )
        ]

    def _check_choices(self, steps: int) -> None:
        """Rejects choices that contradict each other or leave nothing to choose."""
        adaptive, different = self.adaptive_steps, len({*self.granularities})
        if self.drawn_steps is not None and adaptive is not None:
            raise ValueError("method: set drawn_steps or adaptive_steps, not both")
        counts = {
            "drawn_steps": self.drawn_steps,
            "adaptive_steps.count": None if adaptive is None else adaptive.count,
        }
        for key, count in counts.items():
            if count is not None and count >= steps:
                raise ValueError(
                    f"method.{key}: {count} of {steps} stochastic steps leaves no choice; use "
                    "fewer or add to method.stochastic_steps"
                )
        if self.adaptive_granularities is not None and (
            different < 2 or different < len(self.granularities)
        ):
            raise ValueError(
                "method.adaptive_granularities needs two or more different granularities, not "
                f"{list(self.granularities)}"
            )

    def phase(
        self, shape: RolloutShape, iteration: int, measurements: Measurements | None = None
    ) -> Branches:
        """The branches of ``iteration``."""
        steps, granularities = tuple(sorted(self.steps_of(shape.steps))), self.granularities
        if self.drawn_steps is not None:
            order = permutation(len(steps), shape.seed, "stochastic-steps", iteration)
            steps = tuple(steps[place] for place in sorted(order[: self.drawn_steps]))
        measured = self.measures(iteration)
        if self.adaptive_steps is not None and "signal_to_noise" not in measured:
            steps = self.adaptive_steps.chosen(steps, measurements)
        if self.adaptive_granularities is not None and "agreement" not in measured:
            granularities = self.adaptive_granularities.chosen(granularities, measurements)
        return Branches(steps, granularities)

    def measures(self, iteration: int) -> frozenset[Measurement]:
        choices: dict[Measurement, AdaptiveSteps | AdaptiveGranularities | None] = {
            "signal_to_noise": self.adaptive_steps,
            "agreement": self.adaptive_granularities,
        }
        return frozenset(k for k, one in choices.items() if one is not None and one.due(iteration))

    def tree(self, shape: RolloutShape, phase: Branches) -> RolloutTree:
        """The anchor, its branches and their continuations."""
        tree = RolloutTree(shape.steps)
        anchor = [tree.initial(sample=0)]
        last = shape.steps if self.log_anchor_reward else max(phase.steps)
        for node in range(1, last + 1):
            anchor.append(tree.ode(anchor[-1], node))
        if self.log_anchor_reward:
            tree.logged_images.append(anchor[-1])
        for step in phase.steps:
            # All branches leave the anchor's state, so the sweep evaluates its velocity once for
            # the anchor and the G branches (the released code does so for each sample).
            branches = [
                tree.sde(anchor[step], sample, record=True) for sample in range(shape.group_size)
            ]
            for granularity in phase.granularities:
                nodes = continuation_nodes(step, granularity, shape.steps)[1:]
                images = tuple(tree.follow(branch, nodes) for branch in branches)
                tree.groups.append(Group(images, step, granularity))
        return tree
