"""The rollout engine: one walk over the sigma grid for all trajectories of all prompts.

At each node the velocities of all live states are evaluated once, in micro-batches, and each state
takes all its steps (ODE or SDE, to the next node or a strided one). States shared by trajectories
are computed once and all evaluations are batched; the mathematics is that of one trajectory at a
time. The host never waits for the device: nothing is read back, and noise and indices are sent
through pinned memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from g2rpo.batching import BatchSize
from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import RolloutTree
from g2rpo.flow.schedule import SigmaGrid
from g2rpo.flow.transition import Transition, per_state, second_order_weight, transition_mean
from g2rpo.flow.upload import indices, to_device

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents [B, ...], times [B] in [0, 1], prompt indices [B] int64) -> velocity [B, ...]."""

Noise = Callable[[int, int, int], torch.Tensor]
"""(prompt index, sample, step) -> standard normal noise [...]; step -1 is the initial noise."""

Key = tuple[int, int]
"""A state of the walk: (prompt index, state of the tree)."""

INITIAL_NOISE = -1


class Continuations(Protocol):
    """An approximate velocity for states that no log-prob depends on."""

    def __call__(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        prompts: torch.Tensor,
        keys: Sequence[Key],
    ) -> torch.Tensor:
        """As :data:`Velocity`; ``keys`` are the states of the rows."""

    def passed(self, node: float) -> None:
        """Called when all states of ``node`` have been evaluated."""


@dataclass(frozen=True)
class Velocities:
    """The policy's exact velocity, and one for all states but ``RolloutTree.policy_states``."""

    exact: Velocity
    continuations: Continuations | None = None


@dataclass(frozen=True)
class RecordedStep:
    """The stochastic transitions of one grid step, recorded for training.

    Attributes:
        step: k, from sigma_k to sigma_{k+1}.
        time: the model's time at sigma_k.
        transition: its law.
        sources: the S distinct source states x_k, [P, S, ...].
        means: the mean of the step from each source under the rollout policy, [P, S, ...].
        source_of: the source of each of the N transitions, [N] int64.
        samples: the sample index of each transition.
        next_latents: x_{k+1}, rounded to the storage dtype, [P, N, ...].
        log_prob: log-prob under the rollout policy, [P, N].
    """

    step: int
    time: float
    transition: Transition
    sources: torch.Tensor
    means: torch.Tensor
    source_of: torch.Tensor
    samples: tuple[int, ...]
    next_latents: torch.Tensor
    log_prob: torch.Tensor


@dataclass(frozen=True)
class Sweep:
    """The result of a walk over the grid.

    Attributes:
        images: latents at sigma = 0 of ``tree.images``, [P, I, ...].
        recorded: the recorded stochastic transitions, by ascending step.
        velocity_evaluations: velocity evaluations (NFE) over all P prompts.
        states: the latents of every state of the tree, [P, states, ...], if kept.
    """

    images: torch.Tensor
    recorded: tuple[RecordedStep, ...]
    velocity_evaluations: int
    states: torch.Tensor | None = None


@dataclass(frozen=True)
class SweepSettings:
    """How the states are stored and batched.

    Attributes:
        transitions: the law of a stochastic step from each of the T nodes.
        micro_batch: states per velocity evaluation batch; halved when memory runs out.
        dtype: storage dtype of latents; x' is rounded to it before its log-prob is computed.
        device: the device of the latents.
        keep_states: returns all states; otherwise latents are freed when the walk has passed them.
    """

    transitions: tuple[Transition, ...]
    micro_batch: int | BatchSize
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    keep_states: bool = False


@torch.no_grad()
def sweep(
    tree: RolloutTree,
    grid: SigmaGrid,
    prompts: int,
    velocity: Velocity | Velocities,
    noise: Noise,
    settings: SweepSettings,
) -> Sweep:
    """Walks ``tree`` for ``prompts`` prompts at once.

    Args:
        tree: the states, the same for every prompt.
        grid: sigmas and model times.
        prompts: P.
        velocity: the policy's velocity for a batch of states, possibly with an approximation.
        noise: standard normal noise for (prompt, sample, step).
        settings: transitions, batching, storage.

    Raises:
        UserError: memory is too small for a single state. If it is too small for a batch, the
            node is evaluated again in smaller batches. Or a recorded step has no noise.
    """
    if tree.steps != grid.steps:
        raise ValueError(f"the tree has {tree.steps} steps, the grid {grid.steps}")
    velocities = velocity if isinstance(velocity, Velocities) else Velocities(velocity)
    return _Walk(tree, grid, prompts, velocities, noise, settings).run()


class _Walk:
    """The live latents of a walk, [P, ...] for each state."""

    def __init__(
        self,
        tree: RolloutTree,
        grid: SigmaGrid,
        prompts: int,
        velocities: Velocities,
        noise: Noise,
        settings: SweepSettings,
    ) -> None:
        self.tree, self.grid, self.prompts = tree, grid, prompts
        self.velocities, self.noise, self.settings = velocities, noise, settings
        size = settings.micro_batch
        self.size = size if isinstance(size, BatchSize) else BatchSize(size)
        self.exact = tree.policy_states if velocities.continuations is not None else set()
        self.kept = frozenset(tree.recorded)
        self.latents: dict[int, torch.Tensor] = {}
        # States left by a second-order step, and the image predictions at their parents, [P, ...].
        self.second_order = {self._parent(i) for i, s in enumerate(tree.states) if s.order == 2}
        self.history: dict[int, torch.Tensor] = {}
        self.recorded: list[RecordedStep] = []
        self.evaluations = 0

    def run(self) -> Sweep:
        start = [index for index, state in enumerate(self.tree.states) if state.parent is None]
        self._arrive(start, self._draw(start, INITIAL_NOISE))
        departures: dict[float, list[int]] = {}
        for index, state in enumerate(self.tree.states):
            if state.parent is not None:
                departures.setdefault(self.tree.states[state.parent].node, []).append(index)
        # Steps only lead to later nodes, so all states of a node exist before any of them is left.
        # Each is evaluated once, however many steps leave it (G branches leave one anchor state),
        # and all prompts and granularities share batches.
        for node, leaving in sorted(departures.items()):
            self._leave(node, leaving)
        keep = self.settings.keep_states
        return Sweep(
            self._stack(self.tree.images),
            tuple(self.recorded),
            self.evaluations,
            self._stack(range(len(self.tree.states))) if keep else None,
        )

    def _leave(self, node: float, leaving: list[int]) -> None:
        """Evaluates the parents of ``leaving`` and takes the steps to ``leaving``."""
        sources = list(dict.fromkeys(self._parent(state) for state in leaving))
        latents = self._stack(sources)
        velocities = self._evaluate(latents, node, sources)
        row = {source: place for place, source in enumerate(sources)}
        by_kind: dict[tuple[float, bool, float | None], list[int]] = {}
        for state in leaving:
            target = self.tree.states[state]
            before = None
            if target.order == 2:
                before = self.tree.states[self._parent(self._parent(state))].node
            by_kind.setdefault((target.node, target.sample is not None, before), []).append(state)
        sigma, _ = self.grid.level(node)
        predictions = latents - sigma * velocities if self.second_order else None
        for (target_node, stochastic, before), states in by_kind.items():
            places = [row[self._parent(state)] for state in states]
            sigma_next, _ = self.grid.level(target_node)
            if stochastic:
                moved = self._stochastic(int(node), states, places, latents, velocities)
            else:
                delta = sigma_next - sigma
                moved = _select(latents, places) + _select(velocities, places) * delta
            if before is not None and predictions is not None:
                weight = second_order_weight(self.grid.level(before)[0], sigma, sigma_next)
                history = [self.history[self._parent(state)] for state in states]
                change = _select(predictions, places) - torch.stack(history, dim=1)
                moved = moved + change * weight
            self._arrive(states, moved)
            for state, place in zip(states, places, strict=True):
                if predictions is not None and state in self.second_order:
                    self.history[state] = predictions[:, place]
        for source in sources:
            self.history.pop(source, None)
            if not self.settings.keep_states:
                del self.latents[source]

    def _parent(self, state: int) -> int:
        parent = self.tree.states[state].parent
        assert parent is not None
        return parent

    def _arrive(self, states: Sequence[int], latents: torch.Tensor) -> None:
        self.latents.update(zip(states, latents.unbind(1), strict=True))

    def _stack(self, states: Sequence[int]) -> torch.Tensor:
        """The latents of ``states``, [P, len(states), ...]."""
        return torch.stack([self.latents[state] for state in states], dim=1)

    def _draw(self, states: Sequence[int], step: int) -> torch.Tensor:
        """The noise that drives ``states``, [P, len(states), ...], drawn once per sample."""
        samples = [s for s in (self.tree.states[state].sample for state in states) if s is not None]
        rows = []
        for prompt in range(self.prompts):
            drawn = {sample: self.noise(prompt, sample, step) for sample in samples}
            rows.append(torch.stack([drawn[sample] for sample in samples]))
        return to_device(torch.stack(rows), self.settings.device, self.settings.dtype)

    def _evaluate(self, latents: torch.Tensor, node: float, sources: list[int]) -> torch.Tensor:
        """Velocities of ``latents`` [P, S, ...], the states ``sources`` of every prompt."""
        self.evaluations += latents.shape[0] * latents.shape[1]
        continuations = self.velocities.continuations
        if continuations is None:
            return self._in_batches(latents, node, sources)
        velocities = torch.empty_like(latents)
        exact = [place for place, state in enumerate(sources) if state in self.exact]
        others = [place for place, state in enumerate(sources) if state not in self.exact]
        for places, approximate in ((exact, None), (others, continuations)):
            if places:
                chosen = [sources[place] for place in places]
                part = self._in_batches(_select(latents, places), node, chosen, approximate)
                velocities.index_copy_(1, indices(places, latents.device), part)
        continuations.passed(node)
        return velocities

    def _in_batches(
        self,
        latents: torch.Tensor,
        node: float,
        states: list[int],
        approximate: Continuations | None = None,
    ) -> torch.Tensor:
        """The velocities of all P * S states of ``latents`` [P, S, ...], in micro-batches."""
        flat = latents.flatten(0, 1)
        keys = [(prompt, state) for prompt in range(self.prompts) for state in states]
        prompt_of = torch.arange(self.prompts, device=flat.device).repeat_interleave(len(states))
        # In bfloat16 a time would keep only eight bits.
        precision = torch.promote_types(flat.dtype, torch.float32)
        times = flat.new_full((len(flat),), self.grid.level(node)[1], dtype=precision)

        def compute(size: int) -> torch.Tensor:
            velocities = torch.empty_like(flat)
            for first in range(0, len(flat), size):
                part = slice(first, first + size)
                batch = flat[part], times[part], prompt_of[part]
                if approximate is None:
                    velocities[part] = self.velocities.exact(*batch)
                else:
                    velocities[part] = approximate(*batch, keys[part])
            return velocities

        return self.size.run(compute).view_as(latents)

    def _stochastic(
        self,
        node: int,
        states: list[int],
        places: list[int],
        latents: torch.Tensor,
        velocities: torch.Tensor,
    ) -> torch.Tensor:
        """``states`` at the next node, each reached by an SDE step from its place."""
        transition = self.settings.transitions[node]
        laws = [transition] * (latents.shape[0] * latents.shape[1])
        flat_mean = transition_mean(latents.flatten(0, 1), velocities.flatten(0, 1), laws)
        means = flat_mean.view_as(latents)
        mean = _select(means, places)
        moved = mean + transition.std * self._draw(states, node)
        kept = [i for i, state in enumerate(states) if state in self.kept]
        if kept:
            if transition.std == 0:
                raise UserError(f"step {node} has no noise to train on; record an earlier step")
            used = sorted({places[i] for i in kept})
            mean, after = _select(mean, kept), _select(moved, kept)
            std = per_state([transition.std] * (mean.shape[0] * mean.shape[1]), mean.flatten(0, 1))
            value = transition.log_prob(after.flatten(0, 1), mean.flatten(0, 1), std)
            samples = [self.tree.states[states[i]].sample for i in kept]
            self.recorded.append(
                RecordedStep(
                    step=node,
                    time=self.grid.timesteps[node],
                    transition=transition,
                    sources=_select(latents, used),
                    means=_select(means, used),
                    source_of=torch.tensor([used.index(places[i]) for i in kept]),
                    samples=tuple(sample for sample in samples if sample is not None),
                    next_latents=after,
                    log_prob=value.view(self.prompts, len(kept)),
                )
            )
        return moved


def _select(latents: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """``latents[:, places]``."""
    return latents.index_select(1, indices(places, latents.device))
