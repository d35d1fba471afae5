"""One experiment in the report: its finished cells, and why others are missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmarks.evaluation.results import Cell, cells_folder, load_cells
from g2rpo.errors import UserError
from reproduce.experiment import (
    HERE,
    ROOT,
    Experiment,
    Profile,
    ResolvedCell,
    Resolver,
    load_experiment,
)
from reproduce.experiment.layout import Layout
from reproduce.experiment.table import TableSpec
from reproduce.stages.cells import why_not
from reproduce.tables.model import Table
from reproduce.tables.notes import Gap, full_label
from reproduce.tables.table import compute_table


@dataclass(frozen=True, eq=False)
class Chapter:
    """An experiment under one profile: its finished cells, and the ``gaps`` where there is none."""

    experiment: Experiment
    profile: Profile
    layout: Layout
    cells: tuple[Cell, ...]
    gaps: tuple[Gap, ...]
    resolver: Resolver

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self.experiment.name

    @cached_property
    def spec(self) -> TableSpec:
        """The experiment's table under the profile."""
        return self.experiment.table_spec(self.profile)

    @cached_property
    def table(self) -> Table:
        """The experiment's table, computed once.

        Raises:
            UserError: the cells do not match the table or each other.
        """
        return compute_table(self.spec, self.cells, self.profile.name, self.gaps)

    @cached_property
    def labels(self) -> dict[str, str]:
        """The label with group of each cell's row; its key if it has no row."""
        keys = {cell.info.row: cell.info.row for cell in self.cells}
        rows = {row.key: full_label(row) for row in self.spec.rows}
        return keys | {gap.row: gap.row for gap in self.gaps} | rows

    @property
    def seeds(self) -> tuple[int, ...]:
        """The training seeds of the finished cells."""
        return tuple(sorted({c.info.seed for c in self.cells if c.info.seed is not None}))

    def resolved(self, cell: Cell) -> ResolvedCell | None:
        """The cell as the experiment's files now define it; None if they do not."""
        if cell.info.row not in self.experiment.cells:
            return None
        return self.resolver.resolve(cell.info.row, cell.info.seed or 0)


def load_chapter(
    name: str, profile: Profile, layout: Layout, seeds: Sequence[int] | None = None
) -> Chapter:
    """Reads the finished cells of a bundled experiment or a YAML file, and why others are missing.

    ``seeds`` are the expected ones; None for those of the finished cells, else the profile's.

    Raises:
        UserError: the experiment or a cell cannot be read.
    """
    experiment = load_experiment(name)
    found = load_cells(cells_folder(layout.tables, profile.name, experiment.name))
    cells = tuple(c for c in found if seeds is None or c.info.seed in (None, *seeds))
    resolver = Resolver(experiment, profile)
    if seeds is None:
        seeds = sorted({c.info.seed for c in cells if c.info.seed is not None}) or profile.seeds
    there = {(cell.info.row, cell.info.seed) for cell in cells}
    wanted = [
        (key, seed)
        for key, config in experiment.cells.items()
        for seed in (seeds if config.method is not None else (None,))
    ]
    gaps = [
        Gap(key, _reason(resolver.resolve(key, seed or 0), layout), seed)
        for key, seed in wanted
        if (key, seed) not in there
    ]
    return Chapter(experiment, profile, layout, cells, tuple(gaps), resolver)


def _reason(cell: ResolvedCell, layout: Layout) -> str:
    try:
        return without_root(why_not(cell, layout))
    except UserError as error:
        return without_root(str(error))


def without_root(text: str) -> str:
    """Makes paths in ``text`` relative to the repository."""
    return text.replace(f"{ROOT}/", "")


def finished_experiments(profile: Profile, layout: Layout) -> list[str]:
    """The bundled experiments with finished cells; the paper's tables first."""
    names = sorted(path.stem for path in (HERE / "experiments").glob("*.yaml"))
    names.sort(key=lambda name: not name.startswith("table"))
    folders = {name: cells_folder(layout.tables, profile.name, name) for name in names}
    return [name for name, folder in folders.items() if any(folder.glob("*.json"))]
