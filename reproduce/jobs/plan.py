"""An experiment as a graph of stages: embed, then train, sample, score (or credit), and render."""

import functools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.evaluation.protocol import CreditConfig
from reproduce.experiment import Experiment, Hardware, Profile, ResolvedCell
from reproduce.experiment.layout import Layout, RememberedLayout
from reproduce.stages.shares import Share
from reproduce.stages.work import AnyWork, Embedding, Measurement, Work, cell_file
from slurm.graph import Graph, Needs, Stage


@dataclass(frozen=True)
class Plan:
    """All stages of an experiment, and which of them are done.

    Attributes:
        experiment: the experiment.
        profile: the profile.
        cells: its cells at all seeds.
        layout: where things are.
        graph: the stages.
        works: what each stage but the rendering does.
        done: the stages whose outputs are complete.
    """

    experiment: Experiment
    profile: Profile
    cells: tuple[ResolvedCell, ...]
    layout: Layout
    graph: Graph
    works: Mapping[str, AnyWork]
    done: frozenset[str]

    @functools.cached_property
    def todo(self) -> Graph:
        """The stages that are left; empty where only the table would be rendered again."""
        todo = self.graph.without(self.done)
        if all(stage.kind == "render" for stage in todo.stages.values()):
            return Graph(())
        return todo

    def only(self, names: Collection[str]) -> "Plan":
        """The same plan with nothing to do but the stages ``names`` and the rendering."""
        left = {s.name for s in self.graph.stages.values() if s.kind != "render"} - set(names)
        return replace(self, done=self.done | left)


def make_plan(
    experiment: Experiment, profile: Profile, cells: Sequence[ResolvedCell], layout: Layout
) -> Plan:
    """The plan of ``cells``: stages that several cells share are there once."""
    remembered = RememberedLayout(layout.runs, layout.tables)
    prompts = Embedding(tuple(cells), remembered)
    resources = Needs(1, profile.hardware.evaluation_devices)
    stages = {prompts.name: _stage(prompts, (), resources)}
    works: dict[str, AnyWork] = {prompts.name: prompts}
    done: set[str] = set()
    judged: list[str] = []
    for cell in cells:
        for work, stage in _cell_stages(cell, remembered, experiment.credit, (prompts.name,)):
            if stage.name not in stages:
                stages[stage.name], works[stage.name] = stage, work
                if work.done():
                    done.add(stage.name)
            if stage.kind in ("score", "credit"):
                judged.append(stage.name)
    render = Stage(
        name=f"render/{profile.name}/{experiment.name}",
        kind="render",
        label=experiment.table.title,
        after=tuple(dict.fromkeys(judged)),
        lease=str(layout.experiment(profile.name, experiment.name).resolve() / "leases" / "render"),
    )
    graph = Graph([*stages.values(), render])
    done |= not_needed(graph, done)
    if prompts.name not in done and prompts.done():
        done.add(prompts.name)
    return Plan(experiment, profile, tuple(cells), layout, graph, works, frozenset(done))


def not_needed(graph: Graph, done: set[str]) -> set[str]:
    """Stages that are not done but made only for stages that are."""
    wanted: set[str] = set()
    for stage in reversed(graph.stages.values()):
        if stage.kind == "render" or (stage.name in wanted and stage.name not in done):
            wanted.update(stage.needs)
            wanted.update(name for name in stage.after if name not in done)
    return {s.name for s in graph.stages.values() if s.kind != "render" and s.name not in wanted}


def shares_of(hardware: Hardware) -> list[Share]:
    """The shares in which a cell's prompts are sampled and scored."""
    return [Share(index, hardware.evaluation_shares) for index in range(hardware.evaluation_shares)]


def _cell_stages(
    cell: ResolvedCell, layout: Layout, credit: CreditConfig | None, embedded: tuple[str, ...]
) -> Iterator[tuple[AnyWork, Stage]]:
    """The stages of one cell, each after those it needs."""
    before, hardware = embedded, cell.profile.hardware
    whole = Needs(hardware.training_ranks, hardware.gpus)
    if credit is not None:
        measurement = Measurement(cell, layout, credit)
        yield measurement, _stage(measurement, before, whole)
        return
    if cell.train is not None:
        training = Work("train", cell, layout)
        yield training, _stage(training, before, whole)
        before = (training.name,)
    resources = Needs(1, hardware.evaluation_devices)
    for kind in ("sample", "score"):
        works = [Work(kind, cell, layout, share) for share in shares_of(hardware)]
        names = tuple(work.name for work in works)
        array = names[0].rpartition("/")[0] if len(works) > 1 else None
        for work in works:
            yield work, _stage(work, before, resources, array)
        before = names


def _stage(
    work: AnyWork, needs: tuple[str, ...], resources: Needs, array: str | None = None
) -> Stage:
    payload: dict[str, Any] = {}
    if isinstance(work, Work):
        share = work.share
        payload = {"cell": cell_file(work.cell), "share": [share.index, share.count]}
    elif isinstance(work, Measurement):
        payload = {"cell": cell_file(work.cell)}
    return Stage(
        name=work.name,
        kind=work.kind,
        label=work.label,
        payload=payload,
        needs=needs,
        resources=resources,
        array=array,
        # Joined as text: thousands of paths take a second.
        lease=os.path.join(os.getcwd(), work.lease),  # noqa: PTH109, PTH118
    )
