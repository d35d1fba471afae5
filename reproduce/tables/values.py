"""The numbers of a table, computed once for every format."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.evaluation.metrics import DRIFT
from benchmarks.evaluation.results import Cell, RowScores, gather_rows
from benchmarks.evaluation.statistics import Interval, Label, fixed, row_intervals
from g2rpo.errors import UserError
from reproduce.tables.comparisons import Hacking, judge_hacking
from reproduce.tables.notes import Gap, missing_reason, table_notes
from reproduce.tables.paper import DIGITS, PAPER_NAMES, PaperRow, PaperTables
from reproduce.tables.spec import METRIC_LABELS, ColumnSpec, CostColumn, RowSpec, TableSpec

METRIC_DIGITS = 3
"""Decimals of the measures of diversity, and figures of the largest drift of a table."""


@dataclass(frozen=True)
class Value:
    """One score in the table: an interval, a bare published figure, or neither.

    Attributes:
        digits: decimals shown.
        interval: ours.
        published: the paper's.
        in_domain: the row was trained on this column's reward.
        best: no row of its group shows a higher figure, and at least one other shows any.
    """

    digits: int
    interval: Interval | None = None
    published: float | None = None
    in_domain: bool = False
    best: bool = False

    @property
    def mean(self) -> float | None:
        """The figure itself, or None for a gap."""
        return self.published if self.interval is None else self.interval.mean

    @property
    def shown(self) -> str | None:
        """The figure as printed, or None for a gap."""
        return None if self.mean is None else fixed(self.mean, self.digits)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        label: what the row is called.
        key: its key, empty for the paper's.
        values: one for each score column.
        costs: mean over seeds for each cost column; None where there is none.
        seeds: how many training seeds are behind it; 0 for a model without, None for no result.
        gap: the reason why there is no result.
        from_paper: the figures are the paper's.
        metrics: one for each metric that the table shows.
        hacking: whether it looks like reward hacking; None where that cannot be judged.
    """

    label: str
    key: str
    values: tuple[Value, ...]
    costs: tuple[float | None, ...] = ()
    seeds: int | None = None
    gap: str | None = None
    from_paper: bool = False
    metrics: tuple[Value, ...] = ()
    hacking: Hacking | None = None

    @property
    def interval_label(self) -> Label | None:
        """``checkpoint`` or ``method``, or None where there is no interval."""
        return next((v.interval.label for v in self.values if v.interval is not None), None)


@dataclass(frozen=True)
class Group:
    """Rows that are compared with each other."""

    label: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class PaperBlock:
    """The paper's figures as a table of their own."""

    caption: str
    columns: tuple[str, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Table:
    """Everything a template needs; ``metrics`` are those that any of its cells has."""

    spec: TableSpec
    profile: str
    columns: tuple[ColumnSpec, ...]
    groups: tuple[Group, ...]
    notes: tuple[str, ...]
    paper: PaperBlock | None
    metrics: tuple[str, ...] = ()


def mark_best(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Marks in each column the highest figure of the group; all rows that print it share it."""
    marked = [list(row.values) for row in rows]
    for column in range(len(rows[0].values)):
        shown = [row.values[column].shown for row in rows]
        figures = [float(text) for text in shown if text is not None]
        if len(figures) < 2:
            continue
        for values, text in zip(marked, shown, strict=True):
            if text is not None and float(text) == max(figures):
                values[column] = replace(values[column], best=True)
    return tuple(replace(row, values=tuple(v)) for row, v in zip(rows, marked, strict=True))


def row_costs(row: RowScores, columns: Sequence[CostColumn]) -> tuple[float | None, ...]:
    """Mean over the row's cells of each cost; None where it is not known."""
    costs = [cell.info.cost for cell in row.cells if cell.info.cost is not None]
    if len(costs) < len(row.cells):
        return (None,) * len(columns)
    return tuple(float(np.mean([getattr(cost, column) for cost in costs])) for column in columns)


def measured_row(
    row: RowSpec, table: TableSpec, columns: Sequence[ColumnSpec], result: RowScores
) -> Row:
    scored = [column.reward for column in columns if column.reward in result.rewards]
    intervals = dict(zip(scored, row_intervals(result.scores(scored)), strict=True))
    values = tuple(
        Value(
            digits=column.digits,
            interval=intervals.get(column.reward),
            in_domain=column.reward in row.train,
        )
        for column in columns
    )
    costs = row_costs(result, table.costs)
    return Row(row.label, row.key, values, costs, seeds=len(result.seeds))


def shown_metrics(results: Mapping[str, RowScores]) -> tuple[str, ...]:
    """The metrics that any row has, in the order of their columns."""
    measured = {metric for result in results.values() for metric in result.metrics}
    return tuple(metric for metric in METRIC_LABELS if metric in measured)


def _with_metrics(
    rows: Mapping[str, Row],
    results: Mapping[str, RowScores],
    columns: Sequence[ColumnSpec],
    baseline: str | None,
) -> dict[str, Row]:
    """The rows by key with their metrics and whether they look like reward hacking."""
    shown = shown_metrics(results)
    if not shown:
        return dict(rows)
    intervals = {
        (key, metric): row_intervals(result.metric(metric)[0])[0]
        for key, result in results.items()
        for metric in result.metrics
    }
    drifts = [one.mean for (_, metric), one in intervals.items() if metric == DRIFT]
    digits = dict.fromkeys(shown, METRIC_DIGITS) | {DRIFT: _decimals(max(drifts, default=0.0))}
    rewards = [column.reward for column in columns]
    base = None if baseline is None else results.get(baseline)
    complete = {}
    for key, row in rows.items():
        label, hacking = row.interval_label, None
        if key in results and label is not None:
            hacking = judge_hacking(results[key], base, rewards, label)
        values = tuple(Value(digits[m], interval=intervals.get((key, m))) for m in shown)
        complete[key] = replace(row, metrics=values, hacking=hacking)
    return complete


def _decimals(largest: float) -> int:
    """Decimals that show ``METRIC_DIGITS`` figures of a number, at most eight."""
    if largest <= 0:
        return METRIC_DIGITS
    return min(8, max(0, METRIC_DIGITS - 1 - math.floor(math.log10(largest))))


def _missing_row(row: RowSpec, columns: Sequence[ColumnSpec], costs: int, reason: str) -> Row:
    values = tuple(Value(c.digits, in_domain=c.reward in row.train) for c in columns)
    return Row(row.label, row.key, values, (None,) * costs, gap=reason)


def _paper_row(found: PaperRow, columns: Sequence[str | None], label: str, costs: int = 0) -> Row:
    published: Mapping[str, float] = {str(name): value for name, value in found.scores.items()}
    values = tuple(
        Value(
            DIGITS,
            published=None if column is None else published[column],
            in_domain=column in found.train,
        )
        for column in columns
    )
    return Row(label, "", values, (None,) * costs, from_paper=True)


def _paper_block(spec: TableSpec, paper: PaperTables) -> PaperBlock | None:
    """The paper's rows that the table's rows name, in the paper's own columns."""
    if spec.paper_table is None:
        return None
    groups = []
    for label, rows in spec.groups():
        found = [
            _paper_row(paper.row(spec.paper_table, row.paper), PAPER_NAMES, row.label)
            for row in rows
            if row.paper is not None
        ]
        if found:
            groups.append(Group(label, mark_best(found)))
    caption = (
        f"The paper's figures, for {paper.model}: another model, not comparable "
        f"({paper.source}, {paper.prompts})"
    )
    return PaperBlock(caption, tuple(PAPER_NAMES), tuple(groups))


def select_rows(spec: TableSpec, cells: Sequence[Cell]) -> dict[str, RowScores]:
    """The results of the table's rows by key, checked to be comparable.

    Raises:
        UserError: a cell was trained on other rewards than its row says, or the rows of a group
            were scored on different prompts or under different protocols.
    """
    wanted = {row.key: row for row in spec.rows}
    results = gather_rows(cell for cell in cells if cell.info.row in wanted)
    for key, result in results.items():
        trained = result.cells[0].info.train_rewards
        if set(trained) != set(wanted[key].train):
            raise UserError(
                f"row {key!r}: the table says it is trained on {list(wanted[key].train)}, "
                f"its cells on {list(trained)}"
            )
    for label, rows in spec.groups():
        members = [results[row.key] for row in rows if row.key in results]
        for member in members[1:]:
            _check_comparable(members[0], member, label)
    return results


def _check_comparable(first: RowScores, second: RowScores, group: str) -> None:
    where = f"rows {first.row!r} and {second.row!r} of the group {group!r}"
    if first.cells[0].info.protocol != second.cells[0].info.protocol:
        raise UserError(f"{where} were evaluated under different protocols; evaluate them alike")
    if first.prompt_ids != second.prompt_ids:
        raise UserError(f"{where} were scored on different prompts; evaluate them alike")


def build_table(
    spec: TableSpec,
    cells: Sequence[Cell],
    *,
    profile: str,
    paper: PaperTables,
    gaps: Sequence[Gap] = (),
) -> Table:
    """Computes a table.

    Args:
        spec: what it shows.
        cells: finished cells; those of other tables' rows are left out.
        profile: the profile the cells were measured under.
        paper: the paper's figures.
        gaps: reasons for what is missing; without one the reason is ``not run``.

    Raises:
        UserError: the cells do not fit the table or each other.
    """
    columns = spec.columns_for(profile)
    results = select_rows(spec, cells)
    beside = spec.paper_table is not None and profile in spec.paper_profiles
    measured = {
        row.key: measured_row(row, spec, columns, results[row.key])
        if row.key in results
        else _missing_row(row, columns, len(spec.costs), missing_reason(row.key, gaps))
        for row in spec.rows
    }
    measured = _with_metrics(measured, results, columns, spec.baseline)
    groups = []
    for label, rows in spec.groups():
        lines = list(mark_best([measured[row.key] for row in rows]))
        if beside and spec.paper_table is not None:
            lines = _interleave(spec, rows, lines, paper, columns)
        groups.append(Group(label, tuple(lines)))
    block = None if beside else _paper_block(spec, paper)
    notes = table_notes(spec, {c.reward: c.label for c in columns}, results, gaps)
    if beside:
        notes = (*notes, f"Paper: the figures of {paper.source} ({paper.model}, {paper.prompts}).")
    metrics = shown_metrics(results)
    return Table(spec, profile, columns, tuple(groups), notes, block, metrics)


def _interleave(
    spec: TableSpec,
    rows: Sequence[RowSpec],
    lines: Sequence[Row],
    paper: PaperTables,
    columns: Sequence[ColumnSpec],
) -> list[Row]:
    """Our rows, each followed by the paper's figures for it."""
    assert spec.paper_table is not None
    names = [column.paper for column in columns]
    published = {
        row.key: _paper_row(
            paper.row(spec.paper_table, row.paper), names, f"{row.label} (paper)", len(spec.costs)
        )
        for row in rows
        if row.paper is not None
    }
    marked = mark_best(tuple(published.values())) if published else ()
    published = dict(zip(published, marked, strict=True))
    both = [(line, published.get(line.key)) for line in lines]
    return [row for pair in both for row in pair if row is not None]
