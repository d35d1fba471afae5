"""A graph of stages: their dependencies, the devices they need, and their order."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any


@dataclass(frozen=True)
class Needs:
    """The devices that one stage runs on.

    Attributes:
        ranks: processes, one per GPU if it has GPUs.
        gpus: GPUs in total; 0 for a stage that runs on the CPU.
        memory_gb: main memory in total, in GB; None leaves it to the cluster profile.
    """

    ranks: int = 1
    gpus: int = 0
    memory_gb: int | None = None


@dataclass(frozen=True)
class Stage:
    """One unit of work: it completes as a whole or not at all, and has one owner at a time.

    Attributes:
        name: unique in the graph, and the same in every submission of the same work.
        kind: the type of work, e.g. ``train``.
        label: the name shown to users, e.g. ``hps/g2rpo, seed 1``.
        payload: JSON for the entry point.
        needs: stages that must have succeeded before.
        after: stages that must have ended before, successfully or not.
        resources: the devices it runs on.
        array: shared by the stages of one array job; None for a job of its own.
        lease: absolute path of its lease folder, which records its attempts and progress.
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
    """Stages by name, each after its dependencies, otherwise in the order given.

    Raises:
        ValueError: duplicate name, unknown dependency, or dependency cycle.
    """

    def __init__(self, stages: Iterable[Stage]) -> None:
        listed = list(stages)
        by_name = {stage.name: stage for stage in listed}
        if len(by_name) != len(listed):
            raise ValueError("two stages have the same name")
        for stage in listed:
            for other in (*stage.needs, *stage.after):
                if other not in by_name:
                    raise ValueError(f"{stage.name} depends on unknown stage {other}")
        sorter = TopologicalSorter({s.name: (*s.needs, *s.after) for s in listed})
        try:
            sorter.prepare()
        except CycleError as error:
            raise ValueError(f"dependency cycle: {' -> '.join(error.args[1])}") from None
        position = {stage.name: index for index, stage in enumerate(listed)}
        self.stages: dict[str, Stage] = {}
        while ready := sorted(sorter.get_ready(), key=position.__getitem__):
            self.stages |= {name: by_name[name] for name in ready}
            sorter.done(*ready)

    def __len__(self) -> int:
        return len(self.stages)

    def __getitem__(self, name: str) -> Stage:
        return self.stages[name]

    def without(self, done: Iterable[str]) -> "Graph":
        """The graph that is left once the stages ``done`` have succeeded."""
        gone = set(done)

        def left(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name for name in names if name not in gone)

        return Graph(
            replace(stage, needs=left(stage.needs), after=left(stage.after))
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
