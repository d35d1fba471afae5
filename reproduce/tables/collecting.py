"""Collects the results of finished cells (scores, costs, provenance) from their run folders."""

import logging
from collections.abc import Iterable
from dataclasses import replace

from benchmarks.evaluation.results import Cell, cells_folder, load_cell, save_cell
from g2rpo.errors import UserError
from reproduce.experiment import ResolvedCell
from reproduce.experiment.layout import Layout
from reproduce.runs.finished import read_run
from reproduce.tables.notes import Gap

logger = logging.getLogger(__name__)


def collect_all(
    cells: Iterable[ResolvedCell], layout: Layout, experiment: str
) -> tuple[list[Cell], list[Gap]]:
    """The results of scored cells, and why others cannot be read."""
    found: list[Cell] = []
    gaps: list[Gap] = []
    for cell in cells:
        try:
            found.append(_collected(cell, layout, experiment))
        except UserError as error:
            gaps.append(Gap(cell.key, str(error), cell.seed))
    # Output must not depend on which cell finished first.
    found.sort(key=lambda cell: (cell.info.row, cell.info.seed or 0))
    return found, gaps


def _collected(cell: ResolvedCell, layout: Layout, experiment: str) -> Cell:
    """The cell's result; it is written unless it already is, intact and of these runs.

    Raises:
        UserError: the cell is not finished, or a file of its run is corrupt.
    """
    folder = cells_folder(layout.tables, cell.profile.name, experiment)
    path = folder / f"{cell.name}.json"
    runs = {"train": layout.training(cell).name, "evaluation": layout.evaluation(cell).name}
    if path.exists():
        try:
            known = load_cell(path)
            if known.info.runs == runs and set(known.rewards) == set(cell.profile.rewards):
                return known
        except UserError as error:
            logger.warning("%s; writing it again", error)
    run = read_run(layout.training(cell), layout.evaluation(cell))
    if not run.cells or not run.finished:
        raise UserError(f"{cell.key}, seed {cell.seed}: not finished; run it first")
    (found,) = run.cells
    named = {
        "row": cell.key,
        "method": cell.method,
        "train_rewards": cell.train_rewards if cell.train is None else tuple(cell.train.rewards),
        "preset": cell.preset,
        "seed": cell.seed,
        "protocol": found.info.protocol.model_copy(update={"name": cell.evaluation.name}),
    }
    return load_cell(save_cell(replace(found, info=found.info.model_copy(update=named)), folder))
