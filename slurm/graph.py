"""A graph of stages: what each needs, what it runs on, and in which order."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any


@dataclass(frozen=True)
class Needs:
    """The devices that one stage runs on.

    Attributes:
        ranks: processes, one per GPU where it has GPUs.
        gpus: GPUs in all; 0 for a stage that runs on the CPU.
        minutes: how long it is expected to take at most; None where that is not known.
        memory_gb: main memory in all; None leaves it to the cluster profile.
    """

    ranks: int = 1
    gpus: int = 0
    minutes: int | None = None
    memory_gb: int | None = None


@dataclass(frozen=True)
class Stage:
    """One piece of work that is done whole or not at all, by one owner at a time.

    Attributes:
        name: unique in the graph, and the same in every submission of the same work.
        kind: what sort of work it is, e.g. ``train``.
        label: what people call it, e.g. ``hps/g2rpo, seed 1``.
        payload: what the entry point is given; JSON.
        needs: stages that must have succeeded before.
        after: stages that must have ended before, whatever became of them.
        resources: the devices it runs on.
        array: stages of one array job have the same; None for a job of its own.
        lease: the folder of its lease, where its attempts and its progress are; a path that is
            the same from everywhere.
    """

    name: str
    kind: str
    label: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    resources: Needs = Needs()
    array: str | None = None
    lease: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.label}"


class Graph:
    """Stages by name, each after those that it depends on.

    Raises:
        ValueError: a name is there twice, a dependency is unknown, or they form a circle.
    """

    def __init__(self, stages: Iterable[Stage]) -> None:
        listed = list(stages)
        by_name = {stage.name: stage for stage in listed}
        if len(by_name) != len(listed):
            raise ValueError("two stages have the same name")
        for stage in listed:
            for other in (*stage.needs, *stage.after):
                if other not in by_name:
                    raise ValueError(f"{stage.name} depends on {other}, which is no stage")
        sorter = TopologicalSorter({s.name: (*s.needs, *s.after) for s in listed})
        try:
            order = list(sorter.static_order())
        except CycleError as error:
            raise ValueError(f"stages depend on each other: {error.args[1]}") from None
        # Stable: among stages that could come next, as they were given.
        rank = _depths(by_name, order)
        self.stages = {s.name: s for s in sorted(listed, key=lambda stage: rank[stage.name])}

    def __len__(self) -> int:
        return len(self.stages)

    def __getitem__(self, name: str) -> Stage:
        return self.stages[name]

    def without(self, done: Iterable[str]) -> "Graph":
        """The graph of what is left when the stages ``done`` have succeeded."""
        gone = set(done)
        return Graph(
            Stage(
                **{
                    **vars(stage),
                    "needs": tuple(name for name in stage.needs if name not in gone),
                    "after": tuple(name for name in stage.after if name not in gone),
                }
            )
            for stage in self.stages.values()
            if stage.name not in gone
        )

    def downstream(self, names: Iterable[str]) -> set[str]:
        """``names`` and all stages that need one of them, directly or not."""
        found = set(names)
        for stage in self.stages.values():
            if found.intersection(stage.needs):
                found.add(stage.name)
        return found


def _depths(stages: Mapping[str, Stage], order: Iterable[str]) -> dict[str, int]:
    depths: dict[str, int] = {}
    for name in order:
        before = (*stages[name].needs, *stages[name].after)
        depths[name] = 1 + max((depths[other] for other in before), default=0)
    return depths
