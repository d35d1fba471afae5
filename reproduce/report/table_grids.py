"""A computed table as the tables of the page, each with columns of its own over the same rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from benchmarks.evaluation.results import Cell
from benchmarks.evaluation.statistics import ALPHA, NOTHING, p_equation, p_text, signed
from reproduce.experiment.table import CostColumn
from reproduce.report.grids import Box, Column, Grid, anchor, make_grid, number, text_box
from reproduce.tables.labels import COST_LABELS
from reproduce.tables.model import (
    HACKING_LABEL,
    IN_DOMAIN,
    Mark,
    Number,
    Row,
    RowComparison,
    Score,
    Table,
)
from reproduce.tables.model import Column as TableColumn

Name = TypeVar("Name", bound=str)

PHASES = {
    "sampling": "Sampling",
    "scoring": "Decoding and rewards",
    "training": "Forwards, backwards, update",
}
"""The phases of an iteration that a run's metrics tell, in order."""
PHASE_PREFIX = "seconds/"
COST_PARTS = ("Rollout evaluations", "3 × backwards")
"""What the measure of equal cost adds up."""


def _grid(
    chapter: str,
    table: Table,
    caption: str,
    columns: Sequence[Column[Row]],
    rows: Sequence[Row],
    notes: Sequence[str] = (),
) -> Grid:
    """A table whose first columns say which row it is."""
    first = [Column[Row](table.row_label, lambda row: _row_box(chapter, row))]
    if table.grouped:
        first.append(Column(table.group_label, lambda row: text_box(row.group)))
    groups = [row.group for row in rows] if table.grouped else []
    return make_grid(caption, [*first, *columns], rows, notes, groups)


def _figures(labels: Mapping[Name, str], box: Callable[[Name, Row], Box]) -> list[Column[Row]]:
    """A column of figures for each name in ``labels``, of the box of that name in a row."""
    return [Column(label, partial(box, name), numeric=True) for name, label in labels.items()]


def _scores(columns: Iterable[TableColumn]) -> list[Column[Row]]:
    labels = {column.name: column.label for column in columns}
    return _figures(labels, lambda name, row: _number_box(row.scores.get(name)))


def _row_box(chapter: str, row: Row) -> Box:
    there = not row.from_paper and row.missing is None
    link = anchor("run", chapter, row.key) if there else None
    return replace(text_box(row.label, "label"), link=link)


def _number_box(found: Number | None) -> Box:
    """A score or a measure with its interval and signs."""
    if found is None:
        return number(None)
    box = replace(number(found.mean, found.text), interval=found.ends)
    if not isinstance(found, Score):
        return box
    notes = [(IN_DOMAIN, "in-domain: trained on this reward")] if found.in_domain else []
    if found.mark is not None and found.mark.p_value < ALPHA:
        notes.append((_sign(found.mark), _sentence(found.mark, found.digits)))
    return replace(box, strong=found.best, notes=tuple(notes))


def _sign(mark: Mark) -> str:
    """A triangle, filled where the difference holds after correction, empty where only before."""
    up, down = ("▲", "▼") if mark.significant else ("△", "▽")
    return up if mark.difference > 0 else down


def _sentence(mark: Mark, digits: int) -> str:
    return (
        f"{signed(mark.difference, digits)} against {mark.reference}, 95% interval "
        f"{signed(mark.low, digits)} to {signed(mark.high, digits)} ({mark.about}), "
        f"{p_equation(mark.p_value)}, {p_equation(mark.p_holm)} after Holm's correction"
    )


def _or_gap(row: Row, box: Box) -> Box:
    """``box``, or for a row without a result the reason."""
    return box if row.missing is None else Box(f"missing: {row.missing}", kind="gap")


def score_grid(chapter: str, table: Table, notes: Sequence[str]) -> Grid:
    """The table itself: scores with intervals and marks; what is missing says why."""
    columns = [
        *_scores(table.columns),
        Column("Seeds", _seeds_box, numeric=True),
        Column("Interval", lambda row: _or_gap(row, text_box(row.about))),
    ]
    rows = [row for _, members in table.groups for row in members]
    return _grid(chapter, table, table.title, columns, rows, notes)


def _seeds_box(row: Row) -> Box:
    count = None if row.from_paper or row.missing is not None else len(row.seeds)
    return number(count, str(count or NOTHING))


def beside_grid(chapter: str, table: Table) -> Grid | None:
    """Diversity, drift and the flag for reward hacking; None where nothing was measured."""
    if not table.metrics:
        return None
    labels = {column.name: column.label for column in table.metrics}
    columns = [
        *_figures(labels, lambda name, row: _number_box(row.metrics.get(name))),
        Column(HACKING_LABEL, lambda row: _hacking_box(table, row)),
    ]
    caption = "Diversity, drift and reward hacking"
    return _grid(chapter, table, caption, columns, table.rows, table.metric_legend)


def _hacking_box(table: Table, row: Row) -> Box:
    said = table.hacking_text(row)
    flagged = row.reward_hacking is not None and row.reward_hacking.flagged
    return _or_gap(row, Box(said, said, kind="warning" if flagged else "text"))


def paper_grid(table: Table) -> Grid | None:
    """The paper's own figures where they may not stand next to ours."""
    if table.published_source is None:
        return None
    columns = _scores(table.published_columns)
    return _grid("", table, table.published_source, columns, table.published)


def cost_grid(chapter: str, table: Table) -> Grid:
    """What one training run took, mean over seeds, in every measure."""
    totals = (row.every_cost.get("equal_cost_evaluations", 0.0) for row in table.rows)
    longest = max(totals, default=0.0) or 1.0
    costs = [source.cost for row in table.rows for source in row.sources]
    devices = sorted({cost.device for cost in costs if cost is not None and cost.iterations})
    notes = ["One training run up to the evaluated checkpoint, mean over seeds."]
    if devices:
        compare = "" if len(devices) == 1 else "; seconds on different devices do not compare"
        notes.append(f"Trained on {', '.join(devices)}{compare}.")
    columns = [
        *_figures(COST_LABELS, lambda name, row: number(row.every_cost.get(name))),
        Column("Shares", lambda row: _cost_bar(row.every_cost, longest)),
    ]
    return _grid(chapter, table, "Cost of training", columns, table.rows, notes)


def _cost_bar(costs: Mapping[CostColumn, float], longest: float) -> Box:
    """Rollout evaluations and backwards in one measure, as shares of the dearest row's."""
    total = costs.get("equal_cost_evaluations")
    if not total:
        return Box(NOTHING)
    rollout = costs["rollout_evaluations"]
    parts = zip(COST_PARTS, (rollout, total - rollout), strict=True)
    return Box("", total, shares=tuple((name, part / longest) for name, part in parts))


def phase_seconds(cell: Cell) -> dict[str, float] | None:
    """Seconds of each phase over all iterations, and of the rest; None where not recorded."""
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
    """Seconds by phase, mean over seeds, as figures and as a bar; None where no run has them."""
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

    def bar(row: Row) -> Box:
        seconds = measured[row.key]
        shares = tuple((names[phase], value / longest) for phase, value in seconds.items())
        return Box("", sum(seconds.values()), shares=shares)

    note = (
        "Seconds of the training iterations by phase, mean over seeds and ranks; validation, "
        "checkpoints and loading are outside of them. Rows of runs that did not record it are left "
        "out."
    )
    columns = [
        *_figures(names, lambda phase, row: number(measured[row.key][phase])),
        Column("Shares", bar),
    ]
    rows = [row for row in table.rows if row.key in measured]
    return _grid(chapter, table, "Seconds by phase", columns, rows, [note])


def comparison_grid(table: Table) -> Grid | None:
    """Every comparison that the table asks for; None where there is none."""
    found = table.comparisons
    if not found:
        return None
    groups = [table.row(one.first).group for one in found]
    columns: list[Column[RowComparison]] = [
        Column("Row", lambda one: text_box(table.row(one.first).label, "label")),
        Column(table.group_label, lambda one: text_box(table.row(one.first).group)),
        Column("Against", lambda one: text_box(table.row(one.second).label)),
        Column("Score", lambda one: _score_name(table, one)),
        Column("Difference", lambda one: _difference_box(table, one), numeric=True),
        Column("p", lambda one: number(one.p_value, p_text(one.p_value)), numeric=True),
        Column("p (Holm)", lambda one: number(one.p_holm, p_text(one.p_holm)), numeric=True),
        Column("About", lambda one: text_box(one.about)),
        Column("Verdict", lambda one: Box(one.verdict, one.verdict, strong=one.significant)),
    ]
    if not any(groups):
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


def _published_box(one: RowComparison) -> Box:
    found = one.published_difference
    return number(found, NOTHING if found is None else signed(found, 3))
