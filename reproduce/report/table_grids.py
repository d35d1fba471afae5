"""A computed table as the sortable tables of the page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from benchmarks.evaluation.results import Cell
from benchmarks.evaluation.statistics import ALPHA, NOTHING, nonzero, p_equation, p_text, signed
from reproduce.experiment.table import CostColumn
from reproduce.report.grids import Box, Column, Grid, anchor, make_grid, number, text_box
from reproduce.tables.blocks import Block, Heading
from reproduce.tables.blocks import Cell as TableCell
from reproduce.tables.model import (
    COST_LABELS,
    HACKING_LABEL,
    IN_DOMAIN,
    Number,
    Row,
    RowComparison,
    Score,
    Table,
)
from reproduce.tables.notes import cost_notes

Name = TypeVar("Name", bound=str)
Line = tuple[Row, tuple[TableCell, ...]]

PHASES = {
    "sampling": "Sampling",
    "scoring": "Decoding and rewards",
    "training": "Forwards, backwards, update",
}
"""The phases of an iteration in a run's metrics, in order."""
PHASE_PREFIX = "seconds/"
COST_PARTS = ("Rollout evaluations", "3 × backwards")
"""The terms of the equal-cost measure."""


def _grid(
    chapter: str,
    table: Table,
    caption: str,
    columns: Sequence[Column[Line]],
    lines: Sequence[Line],
    notes: Sequence[str] = (),
) -> Grid:
    """A table whose first columns name the row."""
    first = [Column[Line](table.row_label, lambda line: _row_box(chapter, line[0]))]
    if table.grouped:
        first.append(Column(table.group_label, lambda line: text_box(line[0].group)))
    groups = [row.group for row, _ in lines] if table.grouped else []
    return make_grid(caption, [*first, *columns], lines, notes, groups)


def _row_box(chapter: str, row: Row) -> Box:
    there = not row.from_paper and row.missing is None
    link = anchor("run", chapter, row.key) if there else None
    return replace(text_box(row.label, "label"), link=link)


def block_grid(chapter: str, table: Table, block: Block, notes: Sequence[str]) -> Grid:
    """A block of the table; missing rows show the reason."""
    caption = block.title if block.suffix else table.title
    columns = [
        Column(heading.label, partial(_cell_box, table, place, heading), heading.numeric)
        for place, heading in enumerate(block.headings)
    ]
    return _grid(chapter, table, caption, columns, block.lines, notes)


def _cell_box(table: Table, place: int, heading: Heading, line: Line) -> Box:
    row, cell = line[0], line[1][place]
    if isinstance(cell, Number):
        return _number_box(table, cell)
    if heading.numeric:
        return number(None if cell is None else int(cell))
    if row.missing is not None:
        return Box(f"missing: {row.missing}", kind="gap")
    flagged = row.reward_hacking is not None and row.reward_hacking.flagged
    warned = flagged and heading.label == HACKING_LABEL
    return text_box(cell, "warning" if warned else "text")


def _number_box(table: Table, found: Number) -> Box:
    """A score or metric with its interval and marks."""
    box = replace(number(found.mean, found.text), interval=found.ends)
    if not isinstance(found, Score):
        return box
    notes = [(IN_DOMAIN, "in-domain: trained on this reward")] if found.in_domain else []
    if found.mark is not None and found.mark.p_value < ALPHA:
        notes.append((_sign(found.mark), _sentence(table, found.mark, found.digits)))
    return replace(box, strong=found.best, notes=tuple(notes))


def _sign(mark: RowComparison) -> str:
    """A triangle, filled if the difference is significant after correction."""
    up, down = ("▲", "▼") if mark.significant else ("△", "▽")
    return up if mark.difference > 0 else down


def _sentence(table: Table, mark: RowComparison, digits: int) -> str:
    reference = table.row(mark.second).full_label
    return (
        f"{signed(mark.difference, digits)} vs. {reference}, 95% interval "
        f"{signed(mark.low, digits)} to {signed(mark.high, digits)} ({mark.about}), "
        f"{p_equation(mark.p_value)}, {p_equation(mark.p_holm)} after Holm's correction"
    )


def _figures(labels: Mapping[Name, str], box: Callable[[Name, Row], Box]) -> list[Column[Line]]:
    """A numeric column for each name."""

    def boxed(name: Name, line: Line) -> Box:
        return box(name, line[0])

    return [Column(label, partial(boxed, name), numeric=True) for name, label in labels.items()]


def cost_grid(chapter: str, table: Table) -> Grid:
    """Every cost of one training run, mean over seeds."""
    totals = (row.every_cost.get("equal_cost_evaluations", 0.0) for row in table.rows)
    longest = max(totals, default=0.0) or 1.0
    costs = [source.cost for row in table.rows for source in row.sources]
    devices = sorted({cost.device for cost in costs if cost is not None and cost.iterations})
    columns = [
        *_figures(COST_LABELS, lambda name, row: number(row.every_cost.get(name))),
        Column("Shares", lambda line: _cost_bar(line[0].every_cost, longest)),
    ]
    lines = [(row, ()) for row in table.rows]
    return _grid(chapter, table, "Training cost", columns, lines, cost_notes(devices))


def _cost_bar(costs: Mapping[CostColumn, float], longest: float) -> Box:
    """The terms of the equal-cost measure as shares of the most expensive row's."""
    total = costs.get("equal_cost_evaluations")
    if not total:
        return Box(NOTHING)
    rollout = costs["rollout_evaluations"]
    parts = zip(COST_PARTS, (rollout, total - rollout), strict=True)
    return Box("", total, shares=tuple((name, part / longest) for name, part in parts))


def phase_seconds(cell: Cell) -> dict[str, float] | None:
    """Seconds of each phase over all iterations, and of the rest; None if not recorded."""
    curve, columns = cell.curve, [PHASE_PREFIX + phase for phase in PHASES]
    if curve is None or not set(columns) <= set(curve):
        return None
    trained = curve[curve["iteration"] > 0]
    if trained.empty or trained[columns].isna().any(axis=None):
        return None
    seconds = {phase: float(trained[PHASE_PREFIX + phase].sum()) for phase in PHASES}
    total = float(trained["seconds"].iloc[-1])
    return seconds | {"rest": max(0.0, total - sum(seconds.values()))}


def phase_grid(chapter: str, table: Table, cells: Sequence[Cell]) -> Grid | None:
    """Seconds by phase, mean over seeds, with a bar; None if no run recorded them."""
    measured: dict[str, dict[str, float]] = {}
    for row in table.rows:
        parts = [phase_seconds(cell) for cell in cells if cell.info.row == row.key]
        known = [part for part in parts if part is not None]
        if known and len(known) == len(parts):
            measured[row.key] = {p: float(np.mean([k[p] for k in known])) for p in known[0]}
    if not measured:
        return None
    names = PHASES | {"rest": "Rest"}
    longest = max(sum(seconds.values()) for seconds in measured.values()) or 1.0

    def bar(line: Line) -> Box:
        seconds = measured[line[0].key]
        shares = tuple((names[phase], value / longest) for phase, value in seconds.items())
        return Box("", sum(seconds.values()), shares=shares)

    note = (
        "Seconds per phase of the training iterations, mean over seeds and ranks. Validation, "
        "checkpoints and loading are not included. Rows without recorded phases are omitted."
    )
    columns = [
        *_figures(names, lambda phase, row: number(measured[row.key][phase])),
        Column("Shares", bar),
    ]
    lines = [(row, ()) for row in table.rows if row.key in measured]
    return _grid(chapter, table, "Seconds by phase", columns, lines, [note])


def comparison_grid(table: Table) -> Grid | None:
    """Every comparison of the table; None if there is none."""
    found = table.comparisons
    if not found:
        return None
    groups = [table.row(one.first).group for one in found]
    columns: list[Column[RowComparison]] = [
        Column("Row", lambda one: text_box(table.row(one.first).label, "label")),
        Column("Question", lambda one: text_box(one.question)),
        Column(table.group_label, lambda one: text_box(table.row(one.first).group)),
        Column("Versus", lambda one: text_box(table.row(one.second).label)),
        Column("Score", lambda one: _score_name(table, one)),
        Column("Difference", lambda one: _difference_box(table, one), numeric=True),
        Column("p", lambda one: number(one.p_value, p_text(one.p_value)), numeric=True),
        Column("p (Holm)", lambda one: number(one.p_holm, p_text(one.p_holm)), numeric=True),
        Column("Label", lambda one: text_box(one.about)),
        Column("Verdict", lambda one: Box(one.verdict, one.verdict, strong=one.significant)),
    ]
    if not any(groups):
        del columns[2]
    if table.asked("primary"):
        columns.append(Column("Detectable", partial(_detectable_box, table), numeric=True))
    else:
        del columns[1]
    if any(one.published_difference is not None for one in found):
        columns.append(Column("Paper's difference", _published_box, numeric=True))
    return make_grid("Comparisons", columns, found, groups=groups)


def _score_name(table: Table, one: RowComparison) -> Box:
    in_domain = one.reward in table.row(one.first).trained_on
    notes = ((IN_DOMAIN, "in-domain"),) if in_domain else ()
    return replace(text_box(table.column(one.reward).label), notes=notes)


def _difference_box(table: Table, one: RowComparison) -> Box:
    digits = table.column(one.reward).digits
    interval = f"[{signed(one.low, digits)}, {signed(one.high, digits)}]"
    return replace(number(one.difference, signed(one.difference, digits)), interval=interval)


def _detectable_box(table: Table, one: RowComparison) -> Box:
    if one.detectable is None:
        return number(None)
    return number(one.detectable, nonzero(one.detectable, table.column(one.reward).digits))


def _published_box(one: RowComparison) -> Box:
    found = one.published_difference
    return number(found, NOTHING if found is None else signed(found, 3))
