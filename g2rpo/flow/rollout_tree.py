"""The states of one prompt's rollout: which exist, how each is reached, what each is for.

A rollout is a tree of trajectories over one sigma grid. It is described here as data, without
tensors, and is the same for every prompt of an iteration; :mod:`g2rpo.flow.sweep` walks it.
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class State:
    """A latent at a grid node.

    Attributes:
        node: index into the grid; T holds images (sigma = 0).
        parent: the state it is reached from, or None for initial noise.
        sample: for initial noise, whose noise it is; for an SDE step, whose step noise drives it;
            None for an ODE step.
    """

    node: int
    parent: int | None
    sample: int | None


@dataclass(frozen=True)
class Group:
    """Images that are compared with one another: one state (at node T) per sample.

    Attributes:
        images: state of each of the G samples.
        step: the stochastic step that this group credits; None credits every trained step.
        granularity: the granularity of its continuations, where the method has one.
    """

    images: tuple[int, ...]
    step: int | None = None
    granularity: int | None = None


@dataclass
class RolloutTree:
    """A builder and container of states.

    Attributes:
        steps: T of the grid.
        states: all states; an index into this list names one.
        recorded: SDE states whose transition is kept for training, in order.
        groups: the groups of images whose rewards are compared.
        logged_images: image states scored only for the log (e.g. the anchor's own image).
    """

    steps: int
    states: list[State] = field(default_factory=list)
    recorded: list[int] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    logged_images: list[int] = field(default_factory=list)
    _ode_states: dict[tuple[int, int], int] = field(default_factory=dict)

    def initial(self, sample: int) -> int:
        """Initial noise at node 0 with the noise of ``sample``."""
        return self._add(State(0, None, sample))

    def ode(self, source: int, target: int) -> int:
        """The state at node ``target`` reached from ``source`` by one ODE step.

        Asked twice, it is the same state: continuations share what they have in common.
        """
        if not self.states[source].node < target <= self.steps:
            raise ValueError(f"no step from node {self.states[source].node} to {target}")
        key = (source, target)
        if key not in self._ode_states:
            self._ode_states[key] = self._add(State(target, source, None))
        return self._ode_states[key]

    def sde(self, source: int, sample: int, *, record: bool) -> int:
        """The next node's state reached from ``source`` with the step noise of ``sample``."""
        state = self._add(State(self.states[source].node + 1, source, sample))
        if record:
            self.recorded.append(state)
        return state

    def follow(self, source: int, nodes: tuple[int, ...]) -> int:
        """The image reached from ``source`` by ODE steps through ``nodes`` and then to sigma 0."""
        for node in (*nodes, self.steps):
            source = self.ode(source, node)
        return source

    @property
    def images(self) -> list[int]:
        """Every distinct image state, in the order in which it was made."""
        wanted = {image for group in self.groups for image in group.images}
        wanted.update(self.logged_images)
        return sorted(wanted)

    @property
    def velocity_evaluations(self) -> int:
        """Velocity evaluations that one walk costs per prompt: one per state that is left."""
        return len({state.parent for state in self.states if state.parent is not None})

    @property
    def policy_states(self) -> set[int]:
        """States whose velocity decides a recorded transition or a logged image.

        They are those that such a state is reached from, back to the initial noise. The others are
        continuations: no log-probability depends on their velocities.
        """
        found: set[int] = set()
        for end in (*self.recorded, *self.logged_images):
            source = self.states[end].parent
            while source is not None and source not in found:
                found.add(source)
                source = self.states[source].parent
        return found

    def _add(self, state: State) -> int:
        self.states.append(state)
        return len(self.states) - 1


def recorded_steps(tree: RolloutTree) -> list[int]:
    """The stochastic steps whose transitions are kept, ascending."""
    return sorted({tree.states[state].node - 1 for state in tree.recorded})


def credited_to(tree: RolloutTree, step: int) -> RolloutTree:
    """The part of ``tree`` that credits ``step``: its groups, and what their images come from."""
    groups = [group for group in tree.groups if group.step in (None, step)]
    kept: set[int] = set()
    for image in {image for group in groups for image in group.images}:
        state: int | None = image
        while state is not None and state not in kept:
            kept.add(state)
            state = tree.states[state].parent
    place = {state: index for index, state in enumerate(sorted(kept))}
    part = RolloutTree(tree.steps)
    for index in place:
        state = tree.states[index].parent
        parent = None if state is None else place[state]
        part.states.append(replace(tree.states[index], parent=parent))
    here = [state for state in tree.recorded if tree.states[state].node - 1 == step]
    part.recorded = [place[state] for state in here if state in place]
    part.groups = [replace(g, images=tuple(place[image] for image in g.images)) for g in groups]
    return part
