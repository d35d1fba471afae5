"""The states of one prompt's rollout: how each is reached and what it is used for.

A rollout is a tree of trajectories over one sigma grid. It is described as data, without tensors,
and is the same for every prompt of an iteration; :mod:`g2rpo.flow.sweep` walks it.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class State:
    """A latent at a node.

    Attributes:
        node: index into the grid; T holds images (sigma = 0), a fraction lies between two of them.
        parent: the state it is reached from; None for initial noise.
        sample: the sample whose initial noise it is or whose step noise drives it; None for an ODE
            step.
        order: of an ODE step: 1 is Euler, 2 is DPM-Solver++ 2M, which also uses the image
            prediction at the parent's parent.
    """

    node: float
    parent: int | None
    sample: int | None
    order: int = 1

    @property
    def step(self) -> int:
        """Of a state reached by an SDE step: that step."""
        return int(self.node) - 1


@dataclass(frozen=True)
class Group:
    """Images whose rewards are compared: one state (at node T) per sample.

    If samples share the credited step, they are one member, with their mean reward.

    Attributes:
        images: the state of each of the G samples.
        step: the stochastic step that this group credits; None credits every trained step.
        granularity: the granularity of its continuations, if the method has one.
        share: consecutive samples per member; the first of them drives the member's step.
    """

    images: tuple[int, ...]
    step: int | None = None
    granularity: int | None = None
    share: int = 1


@dataclass
class RolloutTree:
    """A builder and container of states.

    Attributes:
        steps: T of the grid.
        states: all states; an index into this list names one.
        recorded: SDE states whose transitions are kept for training, in order.
        groups: the groups of images.
        logged_images: image states scored only for the log (e.g. the anchor's image).
    """

    steps: int
    states: list[State] = field(default_factory=list)
    recorded: list[int] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    logged_images: list[int] = field(default_factory=list)
    _ode_states: dict[tuple[int, float, int], int] = field(default_factory=dict)

    def initial(self, sample: int) -> int:
        """The initial noise of ``sample``, at node 0."""
        return self._add(State(0, None, sample))

    def ode(self, source: int, target: float, order: int = 1) -> int:
        """The state at node ``target`` reached from ``source`` by one ODE step of ``order``.

        Repeated calls return the same state, so continuations share common steps.
        """
        if not self.states[source].node < target <= self.steps:
            raise ValueError(f"no step from node {self.states[source].node} to {target}")
        key = (source, target, order)
        if key not in self._ode_states:
            self._ode_states[key] = self._add(State(target, source, None, order))
        return self._ode_states[key]

    def sde(self, source: int, sample: int, *, record: bool) -> int:
        """The state at the next node reached from ``source`` with the step noise of ``sample``."""
        state = self._add(State(self.states[source].node + 1, source, sample))
        if record:
            self.recorded.append(state)
        return state

    def initial_group(self, size: int, *, shared: bool) -> list[int]:
        """The initial noise of each sample of a group: one for all of them, or its own."""
        return [self.initial(0)] * size if shared else [self.initial(i) for i in range(size)]

    def trajectories(
        self,
        starts: Sequence[int],
        stochastic: Collection[int],
        recorded: Collection[int],
        until: int | None = None,
    ) -> tuple[int, ...]:
        """The image of each sample, from its start through every node.

        Args:
            starts: the initial noise of each sample.
            stochastic: the nodes that are left by an SDE step; the others by an ODE step.
            recorded: those of them whose transitions are recorded.
            until: ends at this node instead of the image.
        """
        states = list(starts)
        for node in range(self.steps if until is None else until):
            if node in stochastic:
                record = node in recorded
                states = [self.sde(s, sample, record=record) for sample, s in enumerate(states)]
            else:
                states = [self.ode(state, node + 1) for state in states]
        return tuple(states)

    def follow(self, source: int, nodes: tuple[int, ...]) -> int:
        """The image reached from ``source`` by ODE steps through ``nodes`` to sigma 0."""
        for node in (*nodes, self.steps):
            source = self.ode(source, node)
        return source

    def solve(self, source: int, nodes: Iterable[float]) -> int:
        """As :meth:`follow`, by DPM-Solver++ 2M (arXiv 2211.01095).

        A step from initial noise, which has no history, and the last one are of first order.
        """
        for node in nodes:
            source = self.ode(source, node, 1 if self.states[source].parent is None else 2)
        return self.ode(source, self.steps)

    @property
    def images(self) -> list[int]:
        """All distinct image states, in order of creation."""
        return sorted(
            {image for group in self.groups for image in group.images}.union(self.logged_images)
        )

    @property
    def image_groups(self) -> list[int]:
        """Indices of the groups that compare single images, without repetitions."""
        single = [(i, group.images) for i, group in enumerate(self.groups) if group.share == 1]
        return sorted({images: i for i, images in reversed(single)}.values())

    @property
    def velocity_evaluations(self) -> int:
        """Velocity evaluations (NFE) of one walk per prompt: one per state with successors."""
        return len({state.parent for state in self.states if state.parent is not None})

    @property
    def policy_states(self) -> set[int]:
        """The ancestors of recorded transitions and logged images.

        The other states are continuations: no log-prob depends on their velocities.
        """
        ends = (*self.recorded, *self.logged_images)
        sources = (self.states[end].parent for end in ends)
        return self.with_ancestors(source for source in sources if source is not None)

    def with_ancestors(self, states: Iterable[int]) -> set[int]:
        """``states`` and all states they are reached from."""
        kept: set[int] = set()
        for end in states:
            state: int | None = end
            while state is not None and state not in kept:
                kept.add(state)
                state = self.states[state].parent
        return kept

    def _add(self, state: State) -> int:
        self.states.append(state)
        return len(self.states) - 1


def recorded_steps(tree: RolloutTree) -> list[int]:
    """The stochastic steps whose transitions are recorded, ascending."""
    return sorted({tree.states[state].step for state in tree.recorded})


def credited_to(tree: RolloutTree, step: int) -> RolloutTree:
    """The part of ``tree`` that credits ``step``: its groups and the ancestors of their images."""
    groups = [group for group in tree.groups if group.step in (None, step)]
    kept = tree.with_ancestors(image for group in groups for image in group.images)
    place = {state: index for index, state in enumerate(sorted(kept))}
    part = RolloutTree(tree.steps)
    for index in place:
        state = tree.states[index].parent
        parent = None if state is None else place[state]
        part.states.append(replace(tree.states[index], parent=parent))
    here = [state for state in tree.recorded if tree.states[state].step == step]
    part.recorded = [place[state] for state in here if state in place]
    part.groups = [replace(g, images=tuple(place[image] for image in g.images)) for g in groups]
    return part
