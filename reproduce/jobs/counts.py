"""What a training run will compute, counted beforehand: the counters of its progress at the end.

The counts follow :mod:`g2rpo.training.transitions` and :mod:`g2rpo.training.update`. No model is
loaded; a run's trees are built as often as they differ.
"""

import bisect
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from g2rpo.data.prompts import prompts_of_iteration, read_prompts
from g2rpo.flow.rollout_tree import RolloutTree
from g2rpo.methods.base import (
    Method,
    RolloutShape,
    iterations_by_rollout,
    parse_method,
    rollout_key,
)
from g2rpo.training.config import TrainConfig, ValidationConfig

SAMPLED_GROUPS = 256
"""Groups drawn to average over a method's random choice of the steps that are trained."""


@dataclass(frozen=True)
class TrainingCounts:
    """The counters of a whole run, over all ranks.

    Attributes:
        rollout_evaluations: velocity evaluations in rollouts.
        training_forwards: states that go through a training forward (and, with a KL, the base's).
        training_backwards: states that go through a backward.
        images_scored: images decoded and scored in rollouts.
        exact: whether the forwards and backwards are those of the run. They are an average where
            each sample trains a random part of its steps and states are shared.
    """

    rollout_evaluations: int
    training_forwards: int
    training_backwards: int
    images_scored: int
    exact: bool


@dataclass(frozen=True)
class _Question:
    """All of a configuration that its counts depend on, but for draws.

    Attributes:
        method: the method's class and settings, as JSON.
        shape: sizes of the rollout.
        per_step: whether there is an update for each trained step.
        updates: updates of an iteration that has not.
    """

    method: tuple[type[Method], str]
    shape: RolloutShape
    per_step: bool
    updates: int

    @classmethod
    def of(cls, config: TrainConfig) -> "_Question":
        optimization = config.optimization
        return cls(
            (type(config.method), config.method.model_dump_json()),
            config.shape,
            optimization.update_every == "timestep",
            optimization.updates_per_iteration,
        )

    def update_of(self, sample: int, step: int) -> int:
        """The update that trains the transition of ``sample`` at ``step``."""
        return step if self.per_step else sample // (self.shape.group_size // self.updates)


@dataclass(frozen=True)
class _Group:
    """One prompt's rollout in one iteration.

    Attributes:
        evaluations: velocity evaluations.
        images: distinct images.
        transitions: step, state that is left, and sample of each recorded transition.
    """

    evaluations: int
    images: int
    transitions: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, tree: RolloutTree) -> "_Group":
        transitions = []
        for index in tree.recorded:
            state = tree.states[index]
            assert state.parent is not None
            assert state.sample is not None
            transitions.append((tree.states[state.parent].node, state.parent, state.sample))
        return cls(tree.velocity_evaluations, len(tree.images), tuple(transitions))

    @property
    def steps(self) -> list[int]:
        """The recorded steps, ascending."""
        return sorted({step for step, _, _ in self.transitions})

    @property
    def shares_states(self) -> bool:
        """Whether transitions leave the same state."""
        return len({state for _, state, _ in self.transitions}) < len(self.transitions)

    def trained_states(self, question: _Question, trained: Mapping[int, Sequence[int]]) -> int:
        """States that go through a forward, each once in every update that needs it.

        ``trained`` has the trained steps of each sample.
        """
        return len(
            {
                (question.update_of(sample, step), state)
                for step, state, sample in self.transitions
                if step in trained[sample]
            }
        )


@functools.lru_cache(maxsize=4096)
def _groups(method: tuple[type[Method], str], shape: RolloutShape) -> Mapping[_Group, int]:
    """How many iterations have which rollout."""
    built = method[0].model_validate_json(method[1])
    found: Counter[_Group] = Counter()
    for iteration, count in iterations_by_rollout(built, shape).items():
        found[_Group.of(built.rollout_tree(shape, iteration))] += count
    return found


def _is_random(method: type[Method]) -> bool:
    return method.trained_steps is not Method.trained_steps


@functools.lru_cache(maxsize=4096)
def _states_of_group(question: _Question, group: _Group) -> float:
    """States that a group trains, on average over :data:`SAMPLED_GROUPS` draws."""
    samples = range(question.shape.group_size)
    if not _is_random(question.method[0]):
        return group.trained_states(question, dict.fromkeys(samples, group.steps))
    method = question.method[0].model_validate_json(question.method[1])
    drawn = SAMPLED_GROUPS if group.shares_states else 1
    total = 0
    for number in range(drawn):
        keys = ((f"{number:06d}", sample) for sample in samples)
        trained = {key[1]: method.trained_steps(group.steps, 0, 0, key) for key in keys}
        total += group.trained_states(question, trained)
    return total / drawn


def training_counts(config: TrainConfig, *, draw: bool = False) -> TrainingCounts:
    """The counters of a run of ``config``.

    Args:
        config: the run.
        draw: whether a random choice of trained steps is drawn as the run will draw it (about 15
            microseconds a sample and iteration), and so counted exactly; its prompts must be
            there for that. Otherwise it is averaged.

    Raises:
        UserError: ``draw``, and the prompts cannot be read.
    """
    question, prompts = _Question.of(config), config.rollout.prompts_per_iteration
    groups = _groups(question.method, question.shape)
    exact = not _is_random(type(config.method)) or not any(g.shares_states for g in groups)
    if draw and not exact:
        states, exact = _drawn_states(config, question), True
    else:
        mean = sum(_states_of_group(question, group) * count for group, count in groups.items())
        states = round(mean * prompts)
    with_base = 2 if config.optimization.kl_coefficient > 0 else 1
    return TrainingCounts(
        rollout_evaluations=prompts * sum(g.evaluations * count for g, count in groups.items()),
        training_forwards=states * with_base,
        training_backwards=states,
        images_scored=prompts * sum(group.images * count for group, count in groups.items()),
        exact=exact,
    )


def iterations_within(config: TrainConfig, evaluations: int) -> int:
    """The most iterations whose rollouts take no more velocity evaluations; 1 at the least.

    A method that plans over its iterations, as MixGRPO's window does, is asked with that number.
    """

    def cost(iterations: int) -> int:
        shape = replace(config.shape, iterations=iterations)
        groups = _groups(_Question.of(config).method, shape)
        each = sum(group.evaluations * count for group, count in groups.items())
        return config.rollout.prompts_per_iteration * each

    most = 1
    while cost(2 * most) <= evaluations:
        most *= 2
    # What is left to choose from: most is possible, twice as many is not.
    return most - 1 + bisect.bisect_right(range(most, 2 * most), evaluations, key=cost) or 1


def _drawn_states(config: TrainConfig, question: _Question) -> int:
    method, shape = parse_method(config.method), config.shape
    prompts = read_prompts(Path(config.prompts.file), config.prompts.limit)
    count, seed = config.rollout.prompts_per_iteration, config.seed
    key = rollout_key(method)
    known: dict[object, _Group] = {}
    total = 0
    for iteration in range(shape.iterations):
        place = key(shape, iteration)
        group = known.get(place) or _Group.of(method.rollout_tree(shape, iteration))
        known[place] = group
        for prompt in prompts_of_iteration(prompts, count, seed, iteration):
            trained = {
                sample: method.trained_steps(group.steps, seed, iteration, (prompt.id, sample))
                for sample in range(shape.group_size)
            }
            total += group.trained_states(question, trained)
    return total


def validations(config: ValidationConfig | None, iterations: int) -> int:
    """How often a run validates: before the first iteration, at its interval, and at the end."""
    if config is None:
        return 0
    return 1 + iterations // config.every + (iterations % config.every > 0)
