"""The interface of a method (its rollout and its trained steps) and the registry by name."""

import functools
import importlib
import pkgutil
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

import g2rpo.methods
from g2rpo.config import StrictModel, nearest, unhashed
from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import RolloutTree, recorded_steps
from g2rpo.flow.transition import Kernel, Transition, flow_diffusion, transitions
from g2rpo.methods.adaptive import Measurement, Measurements


@dataclass(frozen=True)
class RolloutShape:
    """The sizes that a method's rollout depends on.

    Attributes:
        steps: denoising steps T.
        group_size: samples per group G.
        iterations: planned training iterations.
        seed: the run's seed, for a method that draws its rollout.
    """

    steps: int
    group_size: int
    iterations: int
    seed: int = 0


class Method(StrictModel):
    """Base class of methods; its fields are the method's configuration.

    A method is a file in :mod:`g2rpo.methods` with a subclass whose ``name`` is that of the file.
    The training loop uses only these members.
    """

    records_transitions: ClassVar[bool] = True
    """Whether the rollout has stochastic steps to train."""
    transition_settings: ClassVar[tuple[str, ...]] = ()
    """Fields that only an objective on transitions uses; any other needs them to be null."""

    name: str
    eta: float = Field(0.7, gt=0)
    """Noise level of the stochastic steps."""
    kernel: Kernel = unhashed("sde")
    """The law of a stochastic step. ``sde``: that of the method's diffusion coefficient. ``cps``:
    coefficient-preserving sampling with noise level ``eta``, at most 1."""

    @model_validator(mode="after")
    def _level(self) -> Self:
        if self.kernel == "cps" and self.eta > 1:
            raise ValueError(f"method.eta={self.eta} with kernel cps; use 1 or less")
        for field in () if self.records_transitions else ("eta", "kernel"):
            if getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"method.{field} has no effect: {self.name} has no noise; omit it")
        return self

    @classmethod
    def concrete(cls, data: Any) -> type[Self]:
        """The method that ``data`` names, or this class."""
        name = data.get("name") if isinstance(data, Mapping) else None
        if cls is not Method or name not in method_names():
            return cls
        members = vars(importlib.import_module(f"g2rpo.methods.{name}")).values()
        kinds = [m for m in members if isinstance(m, type) and issubclass(m, cls)]
        for kind in kinds:
            if "name" in kind.model_fields and kind.model_fields["name"].default == name:
                return kind
        raise UserError(
            f"g2rpo/methods/{name}.py has no method named {name!r}; give its class the default "
            f'`name: Literal["{name}"] = "{name}"`, as its file is called'
        )

    def check(self, shape: RolloutShape) -> list[str]:
        """Rejects impossible combinations and returns notes for the user.

        Raises:
            ValueError: one line that names the key and the fix.
        """
        return []

    def diffusion(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """The SDE coefficient g at each of the T steps: eta sqrt(sigma / (1 - sigma))."""
        return flow_diffusion(self.eta, sigmas)

    def transitions(self, sigmas: Sequence[float]) -> tuple[Transition, ...]:
        """The law of a stochastic step from each of the T nodes."""
        levels = self.diffusion(sigmas) if self.kernel == "sde" else (self.eta,) * len(sigmas)
        return transitions(self.kernel, sigmas, levels)

    def step_weights(self, laws: Sequence[Transition]) -> tuple[float, ...] | None:
        """Factors on the loss of each recorded step, given their laws; None means 1.

        A KL penalty is not weighted.
        """
        return None

    def tree(self, shape: RolloutShape, phase: Any) -> RolloutTree:
        """The rollout of one prompt in an iteration of ``phase``."""
        raise NotImplementedError

    def phase(
        self, shape: RolloutShape, iteration: int, measurements: Measurements | None = None
    ) -> Hashable:
        """The phase of ``iteration`` (counted from 0), on which the tree depends.

        By default all iterations are in one phase and have the same tree. A method that chooses
        its rollout by ``measurements`` gives its cheapest one without them, for planning.
        """
        return 0

    def rollout_tree(
        self, shape: RolloutShape, iteration: int, measurements: Measurements | None = None
    ) -> RolloutTree:
        """The rollout of one prompt in ``iteration`` (counted from 0).

        Raises:
            UserError: it cannot be trained on, which would not show otherwise.
        """
        tree = self.tree(shape, self.phase(shape, iteration, measurements))
        _check_tree(f"method {self.name}: {type(self).__name__}.tree", tree, shape)
        return tree

    def measures(self, iteration: int) -> frozenset[Measurement]:
        """What ``iteration`` measures for later phases; nothing by default."""
        return frozenset()

    def with_resolved_schedule(self, shape: RolloutShape) -> Self:
        """A copy with everything derived from the planned iterations written out.

        A run with another number of iterations then does the same in each of them.
        """
        return self

    def trained_steps(
        self, recorded: Sequence[int], seed: int, iteration: int, key: tuple[str, int]
    ) -> Sequence[int]:
        """The recorded steps trained for one (prompt id, sample); all by default.

        Every sample of an iteration trains the same number of steps.
        """
        return recorded

    def selected(self, shape: RolloutShape, step: int, advantages: Tensor) -> Tensor | None:
        """The samples whose transitions of ``step`` are trained, by their advantages [P, G].

        Returns:
            [P, G] bool with as many for every prompt, whatever the values; None selects all.
        """
        return None


def _check_tree(where: str, tree: RolloutTree, shape: RolloutShape) -> None:
    """Refuses what would train on nonsense, or on nothing.

    Raises:
        UserError: starts with ``where``.
    """
    if not isinstance(tree, RolloutTree):
        raise UserError(f"{where} returned {type(tree).__name__}; return a RolloutTree")
    if tree.steps != shape.steps:
        raise UserError(
            f"{where} has {tree.steps} steps; build RolloutTree(shape.steps), here {shape.steps}"
        )
    if not tree.groups:
        raise UserError(f"{where} has no groups; append a Group of the images to compare")
    recorded = recorded_steps(tree)
    for group in tree.groups:
        nodes = {tree.states[image].node for image in group.images}
        if len(group.images) != shape.group_size:
            raise UserError(
                f"{where} has a group of {len(group.images)} images; give one for each of the "
                f"{shape.group_size} samples"
            )
        if nodes != {tree.steps}:
            raise UserError(
                f"{where} compares states at node {min(nodes):g}, which are no images; follow them "
                f"to node {tree.steps}"
            )
        if group.step not in (None, *recorded):
            raise UserError(
                f"{where} credits step {group.step} by a group, but records the steps {recorded}"
            )
    credited = {group.step for group in tree.groups}
    lost = [step for step in recorded if not credited & {None, step}]
    if lost:
        raise UserError(f"{where} records step {lost[0]}, which no group credits")


def iterations_by_rollout(method: Method, shape: RolloutShape) -> dict[int, int]:
    """The number of iterations with each rollout, by the first iteration that has it.

    If the rollouts are chosen during training, the cheapest ones are assumed.
    """
    if type(method).phase is Method.phase:
        return {0: shape.iterations}
    first: dict[Hashable, int] = {}
    counts: Counter[int] = Counter()
    for iteration in range(shape.iterations):
        counts[first.setdefault(method.phase(shape, iteration), iteration)] += 1
    return dict(counts)


def method_names() -> list[str]:
    """The names of all methods, the files of this package."""
    return list(_names(tuple(g2rpo.methods.__path__)))


@functools.cache
def _names(folders: tuple[str, ...]) -> tuple[str, ...]:
    names = {module.name for module in pkgutil.iter_modules(folders)}
    return tuple(sorted(names - {"adaptive", "base", "presets"}))


def parse_method(value: Any) -> Method:
    """Builds a method from its configuration mapping, by its ``name``.

    Raises:
        UserError: no name, or an unknown method (with the closest match).
        pydantic.ValidationError: a field is invalid.
    """
    if isinstance(value, Method):
        return value
    if not isinstance(value, Mapping) or "name" not in value:
        raise UserError("method: expected a mapping with a name: " + ", ".join(method_names()))
    name = str(value["name"])
    if name not in method_names():
        raise UserError(f"method.name: no method {name!r}; " + nearest(name, method_names()))
    return Method.concrete(value).model_validate(value)


def check_steps(name: str, chosen: Sequence[int], last: int) -> None:
    """Rejects an empty list of steps, repeated steps and steps outside 0..last.

    Raises:
        ValueError: one line.
    """
    if not chosen:
        raise ValueError(f"{name} is empty; give at least one step")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{name} repeats a step: {list(chosen)}")
    for step in chosen:
        if not 0 <= step <= last:
            raise ValueError(f"{name}: step {step} is out of range; use 0 to {last}")
