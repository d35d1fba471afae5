"""Counts what a training run computes, from its rollout trees, before anything is loaded."""

import bisect
import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from g2rpo.flow.rollout_tree import RolloutTree, recorded_steps
from g2rpo.methods.base import Method, RolloutShape, iterations_by_rollout
from g2rpo.policy.size import nfe_per_velocity
from g2rpo.training.checkpoint.folder import equal_cost
from g2rpo.training.config import TrainConfig, ValidationConfig
from g2rpo.training.forward import ForwardObjective

DRAWS = 256
"""Groups over which a random choice of trained steps is averaged."""


@dataclass(frozen=True)
class TrainingCounts:
    """The counters of a whole run, over all ranks.

    Estimates if the method draws the steps of its rollout (those of seed 0) or chooses its rollout
    during training (the cheapest one).

    Attributes:
        rollout_evaluations: velocity evaluations (NFE) in rollouts.
        training_forwards: states that go through a forward in training, also of frozen policies;
            where training has classifier-free guidance, each counts twice.
        training_backwards: states that go through a backward, counted likewise unless the velocity
            of the empty prompt is detached. Exact, except when each sample trains a random part of
            its steps and samples share states: then it is an average.
        images_scored: images decoded and scored in rollouts.
    """

    rollout_evaluations: int
    training_forwards: int
    training_backwards: int
    images_scored: int

    @property
    def equal_cost_evaluations(self) -> int:
        """See :func:`equal_cost`."""
        return int(equal_cost(self))


def training_counts(config: TrainConfig) -> TrainingCounts:
    """The counters of a run of ``config``."""
    method, objective = config.method, config.objective
    times = 0
    if isinstance(objective, ForwardObjective):
        times = objective.times.number(config.grid.steps)
    evaluations, images, updated, states = _counts_of_prompt(
        type(method),
        method.model_dump_json(),
        replace(config.shape, seed=0),
        _samples_per_update(config),
        times,
    )
    backwards = updated
    forwards = backwards + len(config.frozen_policies) * states
    if isinstance(objective, ForwardObjective) and objective.compares_groups:
        small = config.execution.training_micro_batch < config.rollout.group_size
        forwards += states if small else 0
    prompts = config.rollout.prompts_per_iteration
    trained = nfe_per_velocity(config.trained_policy)
    counts = (
        nfe_per_velocity(config.policy) * evaluations,
        trained * forwards,
        (1 if config.guidance.detach_unconditional else trained) * backwards,
        images,
    )
    return TrainingCounts(*(round(prompts * count) for count in counts))


def most_states_of_update(config: TrainConfig, ranks: int) -> int:
    """The most states that an update of the first iteration may train on each rank."""
    tree, samples = config.method.rollout_tree(config.shape, 0), _samples_per_update(config)
    sources: dict[int, set[int | None]] = {}
    for index in tree.recorded:
        state = tree.states[index]
        assert state.sample is not None
        update = state.step if samples is None else state.sample // samples
        sources.setdefault(update, set()).add(state.parent)
    return max(map(len, sources.values())) * config.rollout.prompts_per_iteration // ranks


def iterations_within(config: TrainConfig, cost: Callable[[TrainingCounts], int], most: int) -> int:
    """The most iterations whose ``cost`` is at most ``most``; at least 1.

    A method whose schedule depends on the planned iterations, as MixGRPO's window does, is
    scheduled anew for each number tried.
    """

    def cost_of(iterations: int) -> int:
        planned = config.optimization.model_copy(update={"iterations": iterations})
        return cost(training_counts(config.model_copy(update={"optimization": planned})))

    fits = 1
    while cost_of(2 * fits) <= most:
        fits *= 2
    # ``fits`` iterations are within it, twice as many are not.
    return fits - 1 + bisect.bisect_right(range(fits, 2 * fits), most, key=cost_of) or 1


def validations(config: ValidationConfig | None, iterations: int) -> int:
    """Number of validations: before the first iteration, at the interval, and at the end."""
    return 0 if config is None else 1 - (-iterations // config.every)


@functools.lru_cache(maxsize=4096)
def _counts_of_prompt(
    kind: type[Method], settings: str, shape: RolloutShape, samples: int | None, times: int
) -> tuple[int, int, float, float]:
    """Evaluations, images, and states trained, of one prompt per iteration over all iterations.

    The states are counted once in each update, and once in each iteration. With ``times`` they are
    the images of all groups, each noised to so many times.
    """
    method = kind.model_validate_json(settings)
    evaluations, images, updated, states = 0, 0, 0.0, 0.0
    # The number of iterations decides on their phases, and on no phase's tree.
    alone = replace(shape, iterations=1)
    for iteration, count in iterations_by_rollout(method, shape).items():
        phase = method.phase(shape, iteration)
        rollout = _counts_of_rollout(kind, settings, alone, samples, phase)
        evaluations += count * rollout.evaluations
        images += count * rollout.images
        updated += count * (times * rollout.members if times else rollout.updated)
        states += count * (times * rollout.members if times else rollout.states)
        if "signal_to_noise" in method.measures(iteration):
            updated += count * rollout.steps
    return evaluations, images, updated, states


class _Rollout(NamedTuple):
    """Counts of one prompt's rollout."""

    evaluations: int
    images: int  # distinct ones
    members: int  # images of all groups that compare images
    updated: float  # trained states, counted once in each update
    states: float  # trained states
    steps: int  # recorded ones


@functools.lru_cache(maxsize=4096)
def _counts_of_rollout(
    kind: type[Method], settings: str, shape: RolloutShape, samples: int | None, phase: Hashable
) -> _Rollout:
    """What an iteration of ``phase`` counts for one prompt."""
    method = kind.model_validate_json(settings)
    tree = method.tree(shape, phase)
    return _Rollout(
        tree.velocity_evaluations,
        len(tree.images),
        sum(len(tree.groups[place].images) for place in tree.image_groups),
        *_mean_trained_states(method, tree, shape, samples),
        len(recorded_steps(tree)),
    )


def _mean_trained_states(
    method: Method, tree: RolloutTree, shape: RolloutShape, samples: int | None
) -> tuple[float, float]:
    """Average number of trained states, counted once in each update and once in all of them."""
    steps, group_size = recorded_steps(tree), shape.group_size
    # How many are selected does not depend on the advantages.
    advantages = torch.arange(group_size, dtype=torch.float64)[None]
    masks = ((step, method.selected(shape, step, advantages)) for step in steps)
    unselected = {
        (step, sample)
        for step, mask in masks
        if mask is not None
        for sample in torch.nonzero(~mask[0]).flatten().tolist()
    }
    transitions = []  # step, sample, and the key of the forward
    for index in tree.recorded:
        state = tree.states[index]
        assert state.sample is not None
        if (state.step, state.sample) in unselected:
            continue
        update = 0 if samples is None else state.sample // samples
        transitions.append((state.step, state.sample, (update, state.parent)))
    updated = once = 0
    for draw in range(DRAWS):
        keys = [(f"{draw:06d}", sample) for sample in range(group_size)]
        trained = [method.trained_steps(steps, 0, 0, key) for key in keys]
        chosen = {key for step, sample, key in transitions if step in trained[sample]}
        updated += len(chosen)
        once += len({state for _, state in chosen})
        if all(len(own) == len(steps) for own in trained):  # nothing is random
            return updated / (draw + 1), once / (draw + 1)
    return updated / DRAWS, once / DRAWS


def _samples_per_update(config: TrainConfig) -> int | None:
    """Samples of each group in one update; None where each trained step has its own update."""
    optimization = config.optimization
    if optimization.update_every == "timestep":
        return None
    return config.rollout.group_size // optimization.updates_per_iteration
