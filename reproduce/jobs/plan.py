"""An experiment as a graph of stages: embed, then those of every cell, then the table."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from reproduce.experiment import Experiment, Profile, ResolvedCell
from reproduce.experiment.layout import Layout
from reproduce.stages.base import Stage
from reproduce.stages.cells import cell_stages
from reproduce.stages.embedding import Embed
from reproduce.stages.render import Render
from slurm.graph import Graph


@dataclass(frozen=True)
class Plan:
    """All stages of an experiment, and the names of those whose outputs are complete."""

    experiment: Experiment
    profile: Profile
    cells: tuple[ResolvedCell, ...]
    layout: Layout
    graph: Graph
    """The stages as they are submitted."""
    stages: Mapping[str, Stage]
    """The work of each stage, by name."""
    render: Render
    done: frozenset[str]

    @cached_property
    def todo(self) -> Graph:
        """The stages to run; empty if only the table would be rendered again."""
        todo = self.graph.without(self.done)
        return Graph(()) if set(todo.stages) <= {self.render.name} else todo

    def only(self, names: Collection[str]) -> "Plan":
        """The same plan, restricted to the stages ``names`` and the rendering."""
        left = self.graph.stages.keys() - set(names) - {self.render.name}
        return replace(self, done=self.done | left)


def make_plan(
    experiment: Experiment, profile: Profile, cells: Sequence[ResolvedCell], layout: Layout
) -> Plan:
    """The plan of ``cells``; stages shared by several cells appear once."""
    remembered = layout.remembering()
    embed = Embed(remembered, tuple(cells))
    render = Render(layout, experiment, profile, tuple(cells))
    stages: dict[str, Stage] = {embed.name: embed}
    nodes = [embed.node(profile.hardware)]
    last: dict[str, None] = {}
    for cell in cells:
        before: tuple[str, ...] = (embed.name,)
        for together in cell_stages(cell, remembered):
            for stage in together:
                if stage.name not in stages:
                    stages[stage.name] = stage
                    nodes.append(stage.node(profile.hardware, before))
            before = tuple(stage.name for stage in together)
        last |= dict.fromkeys(before)
    stages[render.name] = render
    made = Graph([*nodes, render.node(profile.hardware, after=tuple(last))])
    # Checking the embeddings is slowest, so it is skipped if no stage needs them.
    done = {name for name, stage in stages.items() if stage is not embed and stage.is_done()}
    done |= not_needed(made, done)
    if embed.name not in done and embed.is_done():
        done.add(embed.name)
    return Plan(experiment, profile, tuple(cells), layout, made, stages, render, frozenset(done))


def not_needed(stages: Graph, done: Collection[str]) -> set[str]:
    """Stages that only stages which are done depend on."""
    *_, last = stages.stages  # the rendering, which depends on all others
    wanted = {last}
    for stage in reversed(stages.stages.values()):
        if stage.name == last or (stage.name in wanted and stage.name not in done):
            wanted.update(stage.needs)
            wanted.update(name for name in stage.after if name not in done)
    return stages.stages.keys() - wanted
