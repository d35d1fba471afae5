"""Collects the results of finished cells (scores, costs, provenance) from their run folders."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

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
            known = collected(cell, layout, experiment)
            found.append(known or load_cell(collect(cell, layout, experiment)))
        except UserError as error:
            gaps.append(Gap(cell.key, str(error), cell.seed))
    # Output must not depend on which cell finished first.
    found.sort(key=lambda cell: (cell.info.row, cell.info.seed or 0))
    return found, gaps


def collected(cell: ResolvedCell, layout: Layout, experiment: str) -> Cell | None:
    """The cell's result, if it is already written, intact and of these runs."""
    path = cells_folder(layout.tables, cell.profile.name, experiment) / f"{cell.name}.json"
    if not path.exists():
        return None
    try:
        found = load_cell(path)
    except UserError as error:
        logger.warning("%s; writing it again", error)
        return None
    runs = {"train": layout.training(cell).name, "evaluation": layout.evaluation(cell).name}
    current = found.info.runs == runs and set(found.rewards) == set(cell.profile.rewards)
    return found if current else None


def collect(cell: ResolvedCell, layout: Layout, experiment: str) -> Path:
    """Writes the cell's result; returns the path of its JSON.

    Raises:
        UserError: the cell is not finished, or a file of its run is corrupt.
    """
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
    info = found.info.model_copy(update=named)
    folder = cells_folder(layout.tables, cell.profile.name, experiment)
    return save_cell(replace(found, info=info), folder)
