"""Counts what a training run computes, from its rollout trees, before anything is loaded."""

import bisect
import functools
from dataclasses import dataclass, replace

from g2rpo.flow.rollout_tree import RolloutTree, recorded_steps
from g2rpo.methods.base import Method, RolloutShape, iterations_by_rollout
from g2rpo.training.config import TrainConfig, ValidationConfig

DRAWS = 256
"""Groups over which a random choice of trained steps is averaged."""


@dataclass(frozen=True)
class TrainingCounts:
    """The counters of a whole run, over all ranks.

    Attributes:
        rollout_evaluations: velocity evaluations (NFE) in rollouts.
        training_forwards: states that go through a training forward (and, with a KL, the base's).
        training_backwards: states that go through a backward. Exact, except when each sample trains
            a random part of its steps and samples share states: then it is an average.
        images_scored: images decoded and scored in rollouts.
    """

    rollout_evaluations: int
    training_forwards: int
    training_backwards: int
    images_scored: int


def training_counts(config: TrainConfig) -> TrainingCounts:
    """The counters of a run of ``config``."""
    method, prompts = config.method, config.rollout.prompts_per_iteration
    evaluations, images, states = _counts_of_prompt(
        type(method), method.model_dump_json(), config.shape, _samples_per_update(config)
    )
    backwards = round(prompts * states)
    with_base = 2 if config.optimization.kl_coefficient > 0 else 1
    return TrainingCounts(prompts * evaluations, with_base * backwards, backwards, prompts * images)


def iterations_within(config: TrainConfig, evaluations: int) -> int:
    """The most iterations whose rollouts take at most ``evaluations`` (NFE); at least 1.

    A method whose schedule depends on the planned iterations, as MixGRPO's window does, is
    scheduled anew for each number tried.
    """
    method, prompts = config.method, config.rollout.prompts_per_iteration

    def cost(iterations: int) -> int:
        shape = replace(config.shape, iterations=iterations)
        rollouts = iterations_by_rollout(method, shape).items()
        return prompts * sum(
            n * method.rollout_tree(shape, i).velocity_evaluations for i, n in rollouts
        )

    most = 1
    while cost(2 * most) <= evaluations:
        most *= 2
    # ``most`` iterations fit, twice as many do not.
    return most - 1 + bisect.bisect_right(range(most, 2 * most), evaluations, key=cost) or 1


def validations(config: ValidationConfig | None, iterations: int) -> int:
    """Number of validations: before the first iteration, at the interval, and at the end."""
    return 0 if config is None else 1 - (-iterations // config.every)


@functools.lru_cache(maxsize=4096)
def _counts_of_prompt(
    kind: type[Method], settings: str, shape: RolloutShape, samples: int | None
) -> tuple[int, int, float]:
    """Evaluations, images and trained states over all iterations, with one prompt per iteration."""
    method = kind.model_validate_json(settings)
    evaluations, images, states = 0, 0, 0.0
    for iteration, count in iterations_by_rollout(method, shape).items():
        tree = method.rollout_tree(shape, iteration)
        evaluations += count * tree.velocity_evaluations
        images += count * len(tree.images)
        states += count * _mean_trained_states(method, tree, shape.group_size, samples)
    return evaluations, images, states


def _mean_trained_states(
    method: Method, tree: RolloutTree, group_size: int, samples: int | None
) -> float:
    """Average number of states that go through a forward, counted once in each update."""
    steps = recorded_steps(tree)
    transitions = []  # step, sample, and the key of the forward
    for index in tree.recorded:
        state = tree.states[index]
        assert state.sample is not None
        update = 0 if samples is None else state.sample // samples
        transitions.append((state.node - 1, state.sample, (update, state.parent)))
    total = 0
    for draw in range(DRAWS):
        keys = [(f"{draw:06d}", sample) for sample in range(group_size)]
        trained = [method.trained_steps(steps, 0, 0, key) for key in keys]
        total += len({key for step, sample, key in transitions if step in trained[sample]})
        if all(len(chosen) == len(steps) for chosen in trained):
            return total / (draw + 1)  # nothing is random
    return total / DRAWS


def _samples_per_update(config: TrainConfig) -> int | None:
    """Samples of each group in one update; None where each trained step has its own update."""
    optimization = config.optimization
    if optimization.update_every == "timestep":
        return None
    return config.rollout.group_size // optimization.updates_per_iteration
