"""What every method says of itself: its rollout, what it trains, and how it is found by name."""

import functools
import importlib
import pkgutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import g2rpo.methods
from g2rpo.config import StrictModel, nearest
from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import RolloutTree


@dataclass(frozen=True)
class RolloutShape:
    """The sizes that a method's rollout depends on.

    Attributes:
        steps: denoising steps T.
        group_size: samples per group G.
        iterations: training iterations planned in all.
    """

    steps: int
    group_size: int
    iterations: int


class Method(StrictModel):
    """The part of a method that is the method itself; its fields are its configuration.

    A method is a file in :mod:`g2rpo.methods` with a class derived from this one whose ``name`` is
    that of the file. The training loop knows methods through these members alone.
    """

    name: str

    @classmethod
    def concrete(cls, data: Any) -> type[Self]:
        """The method that ``data`` names, or this class."""
        name = data.get("name") if isinstance(data, Mapping) else None
        if cls is not Method or name not in method_names():
            return cls
        members = vars(importlib.import_module(f"g2rpo.methods.{name}")).values()
        kinds = [m for m in members if isinstance(m, type) and issubclass(m, cls)]
        return next(kind for kind in kinds if kind.model_fields["name"].default == name)

    def check(self, shape: RolloutShape) -> list[str]:
        """Refuses impossible combinations and returns notes that the user should see.

        Raises:
            ValueError: one line that names the key and the fix.
        """
        del shape
        return []

    def diffusion(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """The SDE coefficient g at each of the T steps."""
        raise NotImplementedError

    def tree(self, shape: RolloutShape, phase: int = 0) -> RolloutTree:
        """The rollout of one prompt in an iteration of ``phase``."""
        raise NotImplementedError

    def phase(self, shape: RolloutShape, iteration: int) -> int:
        """What the tree depends on in ``iteration`` (counted from 0); by default on nothing.

        Iterations of the same phase have the same tree, which is built once to count its cost.
        """
        del shape, iteration
        return 0

    def rollout_tree(self, shape: RolloutShape, iteration: int) -> RolloutTree:
        """The rollout of one prompt in ``iteration`` (counted from 0)."""
        return self.tree(shape, self.phase(shape, iteration))

    def with_resolved_schedule(self, shape: RolloutShape) -> Self:
        """The same method with what it derives from the planned iterations written out.

        A run that may end sooner or later than planned then does the same in each iteration.
        """
        del shape
        return self

    def trained_steps(
        self, recorded: Sequence[int], seed: int, iteration: int, key: tuple[str, int]
    ) -> Sequence[int]:
        """Which of the recorded steps are trained for one (prompt id, sample): all by default.

        The number of them is the same for every sample of an iteration.
        """
        del seed, iteration, key
        return recorded


def iterations_by_rollout(method: Method, shape: RolloutShape) -> dict[int, int]:
    """The number of iterations with each rollout, by the first iteration that has it."""
    if type(method).phase is Method.phase:
        return {0: shape.iterations}
    first: dict[int, int] = {}
    counts: Counter[int] = Counter()
    for iteration in range(shape.iterations):
        counts[first.setdefault(method.phase(shape, iteration), iteration)] += 1
    return dict(counts)


def method_names() -> list[str]:
    """The names of all methods: the files of this package."""
    return list(_names(tuple(g2rpo.methods.__path__)))


@functools.cache
def _names(folders: tuple[str, ...]) -> tuple[str, ...]:
    modules = pkgutil.iter_modules(folders)
    return tuple(
        sorted(module.name for module in modules if module.name not in ("base", "presets"))
    )


def parse_method(value: Any) -> Method:
    """Builds a method from its configuration mapping, found by its ``name``.

    Raises:
        UserError: no name, or no such method (the nearest is named).
        pydantic.ValidationError: a wrong field.
    """
    if isinstance(value, Method):
        return value
    if not isinstance(value, Mapping) or "name" not in value:
        raise UserError("method: expected a mapping with a name: " + ", ".join(method_names()))
    name = str(value["name"])
    if name not in method_names():
        raise UserError(f"method.name: no method {name!r}; " + nearest(name, method_names()))
    return Method.concrete(value).model_validate(value)


def check_steps(name: str, chosen: Sequence[int], steps: int, last: int) -> None:
    """Refuses stochastic steps outside 0..last, repeated ones, or none at all.

    Raises:
        ValueError: one line.
    """
    if not chosen:
        raise ValueError(f"{name} is empty: name at least one step")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{name} names a step twice: {list(chosen)}")
    for step in chosen:
        if not 0 <= step <= last:
            raise ValueError(f"{name} has step {step}: with {steps} steps use 0 to {last}")
