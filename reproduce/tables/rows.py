"""The rows of a table out of its cells: scores, measures, costs, and the paper's figures."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.evaluation.metrics import DRIFT
from benchmarks.evaluation.results import Cell, RowScores, gather_rows
from benchmarks.evaluation.statistics import row_intervals
from g2rpo.config import content_hash
from g2rpo.errors import UserError
from reproduce.experiment.table import CostColumn, RowSpec, TableSpec
from reproduce.tables.labels import COST_LABELS, METRIC_LABELS
from reproduce.tables.model import Column, Number, Row, Score, Source, grouped, interval_fields
from reproduce.tables.notes import full_label
from reproduce.tables.paper import DIGITS, PAPER_NAMES, PaperRow, PaperTables
from reproduce.tables.references import MEASURES, REWARDS

PAPER_COLUMNS = tuple(Column(name=name, label=name, paper=name) for name in PAPER_NAMES)
"""The paper's own columns, for figures that may not stand in ours."""
COMPARED_COSTS: tuple[CostColumn, ...] = (
    "rollout_evaluations",
    "training_backwards",
    "images_scored",
    "device_seconds",
)
METRIC_DIGITS = 3
"""Decimals of the measures of diversity, and figures of the largest drift of a table."""


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
    if first.protocol != second.protocol:
        raise UserError(f"{where} were evaluated under different protocols; evaluate them alike")
    if first.prompt_ids != second.prompt_ids:
        raise UserError(f"{where} were scored on different prompts; evaluate them alike")


def score_columns(spec: TableSpec) -> tuple[Column, ...]:
    """The score columns of the table."""
    return tuple(
        Column(
            name=column.reward,
            label=column.label,
            cite=REWARDS.get(column.reward, ()),
            digits=column.digits,
            paper=column.paper,
        )
        for column in spec.columns
    )


def row_scores(row: RowSpec, columns: Sequence[Column], result: RowScores) -> dict[str, Score]:
    """Every score of a row with its interval, by column; none is marked as the best."""
    scored = [column for column in columns if column.name in result.rewards]
    intervals = row_intervals(result.scores([column.name for column in scored]))
    return {
        column.name: Score(
            **interval_fields(interval),
            digits=column.digits,
            in_domain=column.name in row.train,
            best=False,
        )
        for column, interval in zip(scored, intervals, strict=True)
    }


def mark_best(rows: Sequence[Row]) -> list[Row]:
    """Marks in each column the highest figure of a group; all rows that print it share it."""
    shown: dict[str, list[float]] = {}
    for row in rows:
        for name, score in row.scores.items():
            shown.setdefault(name, []).append(float(score.text))
    best = {name: max(figures) for name, figures in shown.items() if len(figures) > 1}
    return [
        row.model_copy(
            update={
                "scores": {
                    name: score.model_copy(update={"best": float(score.text) == best.get(name)})
                    for name, score in row.scores.items()
                }
            }
        )
        for row in rows
    ]


def row_costs(row: RowScores) -> dict[CostColumn, float]:
    """Mean over the row's cells of every measure of cost; none where one is not known."""
    costs = [cell.info.cost for cell in row.cells if cell.info.cost is not None]
    if len(costs) < len(row.cells):
        return {}
    return {name: float(np.mean([getattr(cost, name) for cost in costs])) for name in COST_LABELS}


def cost_ratios(first: Row, second: Row) -> dict[CostColumn, float]:
    """What training the first cost in units of the second, by measure."""
    costs = [source.cost for row in (first, second) for source in row.sources]
    devices = {cost.device for cost in costs if cost is not None}
    ours, theirs = first.every_cost, second.every_cost
    return {
        name: ours[name] / theirs[name]
        for name in COMPARED_COSTS
        # Seconds on another device are no measure.
        if ours and theirs.get(name) and (name != "device_seconds" or len(devices) == 1)
    }


def row_sources(row: RowScores) -> tuple[Source, ...]:
    """The cells behind a row."""
    return tuple(
        Source(
            seed=info.seed,
            runs=info.runs,
            iteration=info.checkpoint_iteration,
            protocol=info.protocol.hash,
            origin=origin_key(cell),
            cost=info.cost,
        )
        for cell in row.cells
        for info in [cell.info]
    )


def origin_key(cell: Cell) -> str:
    """Names where a cell comes from."""
    return content_hash(cell.info.provenance.model_dump(mode="json"))


# Measures beside the rewards


def row_metrics(results: Mapping[str, RowScores]) -> dict[str, dict[str, Number]]:
    """The measures of each row, by the row's key and the measure's name."""
    intervals = {
        key: {name: row_intervals(row.metric(name)[0])[0] for name in row.metrics}
        for key, row in results.items()
    }
    drifts = [found[DRIFT].mean for found in intervals.values() if DRIFT in found]
    digits = dict.fromkeys(METRIC_LABELS, METRIC_DIGITS) | {DRIFT: _decimals(drifts)}
    return {
        key: {
            name: Number(**interval_fields(found[name]), digits=digits[name])
            for name in METRIC_LABELS
            if name in found
        }
        for key, found in intervals.items()
    }


def metric_columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """The measures that any row has, in the order of their columns."""
    measured = {name for row in rows for name in row.metrics}
    return tuple(
        Column(name=name, label=label, cite=MEASURES.get(name, ()))
        for name, label in METRIC_LABELS.items()
        if name in measured
    )


def _decimals(numbers: Sequence[float]) -> int:
    """Decimals that show ``METRIC_DIGITS`` figures of the largest number, at most eight."""
    largest = max(numbers, default=0.0)
    if largest <= 0:
        return METRIC_DIGITS
    return min(8, max(0, METRIC_DIGITS - 1 - math.floor(math.log10(largest))))


# The paper's figures


def published_rows(
    spec: TableSpec, paper: PaperTables, columns: Sequence[Column]
) -> dict[str, Row]:
    """The paper's rows that the table's rows name, by these rows' keys.

    Args:
        spec: the table.
        paper: the paper's figures.
        columns: of the table, of which those without a paper's column stay empty; or the paper's.
    """
    suffix = "" if columns is PAPER_COLUMNS else " (paper)"
    if spec.paper_table is None:
        return {}
    named = [row for row in spec.rows if row.paper is not None]
    lines = [
        Row(
            key="",
            label=row.label + suffix,
            group=row.group,
            scores=_published_scores(paper.row(spec.paper_table, row.paper), columns),
        )
        for row in named
        if row.paper is not None
    ]
    marked = [line for _, members in grouped(lines) for line in mark_best(members)]
    return {row.key: line for row, line in zip(named, marked, strict=True)}


def _published_scores(found: PaperRow, columns: Sequence[Column]) -> dict[str, Score]:
    return {
        column.name: Score(
            mean=found.scores[column.paper],
            digits=DIGITS,
            in_domain=column.paper in found.train,
            best=False,
        )
        for column in columns
        if column.paper is not None
    }


def table_row(
    row: RowSpec, columns: Sequence[Column], result: RowScores | None, reason: str = ""
) -> Row:
    """A row with its scores; without a result it says why there is none."""
    fields = {
        "key": row.key,
        "label": row.label,
        "group": row.group,
        "trained_on": row.train,
        "full_label": full_label(row),
    }
    if result is None:
        return Row(**fields, scores={}, missing=reason)
    info = result.cells[0].info
    return Row(
        **fields,
        method=info.method,
        preset=info.preset,
        seeds=result.seeds,
        scores=row_scores(row, columns, result),
        sources=row_sources(result),
        every_cost=row_costs(result),
    )
