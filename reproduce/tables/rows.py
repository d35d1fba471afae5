"""A table's rows from its cells: scores, metrics, costs, and the paper's figures."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.evaluation.metrics import DRIFT
from benchmarks.evaluation.results import Cell, RowScores, gather_rows
from benchmarks.evaluation.statistics import row_intervals
from g2rpo.config import content_hash
from g2rpo.errors import UserError
from reproduce.experiment.table import CostColumn, RowSpec, TableSpec
from reproduce.tables.model import (
    COST_LABELS,
    METRIC_LABELS,
    Column,
    Number,
    Row,
    RowComparison,
    Score,
    Source,
    grouped,
)
from reproduce.tables.notes import full_label
from reproduce.tables.paper import DIGITS, PAPER_NAMES, PaperTables
from reproduce.tables.references import MEASURES, REWARDS

PAPER_COLUMNS = tuple(Column(name=name, label=name, paper=name) for name in PAPER_NAMES)
"""The paper's columns, for its figures in their own block."""
METRIC_DIGITS = 3
"""Decimals of the diversity metrics, and significant digits of the largest drift of a table."""


def select_rows(spec: TableSpec, cells: Sequence[Cell]) -> dict[str, RowScores]:
    """The table's rows by key, checked to be comparable.

    Raises:
        UserError: a cell was trained on other rewards than its row, rows of a group were scored on
            different prompts or under different protocols, or two protocols have one name.
    """
    wanted = {row.key: row for row in spec.rows}
    results = gather_rows(cell for cell in cells if cell.info.row in wanted)
    for key, result in results.items():
        trained = result.cells[0].info.train_rewards
        if set(trained) != set(wanted[key].train):
            raise UserError(
                f"row {key!r} is trained on {list(wanted[key].train)} in the table, but on "
                f"{list(trained)} in its cells"
            )
    for label, rows in spec.groups():
        members = [results[row.key] for row in rows if row.key in results]
        for first, other in pairwise(members):
            where = f"rows {first.row!r} and {other.row!r} of the group {label!r}"
            if first.protocol != other.protocol:
                raise UserError(f"{where} were evaluated under different protocols")
            if first.prompt_ids != other.prompt_ids:
                raise UserError(f"{where} were scored on different prompts")
    named: dict[str, RowScores] = {}
    for result in results.values():
        other = named.setdefault(result.protocol.title, result)
        if other.protocol.hash != result.protocol.hash:
            raise UserError(
                f"rows {other.row!r} and {result.row!r} were evaluated under different protocols "
                f"that are both named {result.protocol.title!r}; set another evaluation.name"
            )
    return results


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


def mark_best(rows: Sequence[Row]) -> list[Row]:
    """Marks the highest printed figure of a group in each column; ties share the mark."""
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
    """Every cost, as the mean over the row's cells; empty if any cell's cost is unknown."""
    costs = [cell.info.cost for cell in row.cells if cell.info.cost is not None]
    if len(costs) < len(row.cells):
        return {}
    return {name: float(np.mean([getattr(cost, name) for cost in costs])) for name in COST_LABELS}


def origin_key(cell: Cell) -> str:
    """Names a cell's provenance."""
    return content_hash(cell.info.provenance.model_dump(mode="json"))


def row_metrics(results: Mapping[str, RowScores]) -> dict[str, dict[str, Number]]:
    """Each row's metrics, by the row's key and the metric's name."""
    intervals = {
        key: {name: row_intervals(row.metric(name)[0])[0] for name in row.metrics}
        for key, row in results.items()
    }
    drifts = [found[DRIFT].mean for found in intervals.values() if DRIFT in found]
    digits = dict.fromkeys(METRIC_LABELS, METRIC_DIGITS) | {DRIFT: _decimals(drifts)}
    return {
        key: {
            name: Number(**vars(found[name]), digits=digits[name])
            for name in METRIC_LABELS
            if name in found
        }
        for key, found in intervals.items()
    }


def metric_columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """The metrics that any row has."""
    measured = {name for row in rows for name in row.metrics}
    return tuple(
        Column(name=name, label=label, cite=MEASURES.get(name, ()))
        for name, label in METRIC_LABELS.items()
        if name in measured
    )


def _decimals(numbers: Sequence[float]) -> int:
    """Decimals for ``METRIC_DIGITS`` significant digits of the largest number, at most eight."""
    largest = max(numbers, default=0.0)
    if largest <= 0:
        return METRIC_DIGITS
    return min(8, max(0, METRIC_DIGITS - 1 - math.floor(math.log10(largest))))


def published_rows(
    spec: TableSpec, paper: PaperTables, columns: Sequence[Column]
) -> dict[str, Row]:
    """The paper's figures for the table's rows, by our row's key.

    ``columns`` are the table's, of which those that the paper lacks stay empty, or
    :data:`PAPER_COLUMNS`.
    """
    suffix = "" if columns is PAPER_COLUMNS else " (paper)"
    if spec.paper_table is None:
        return {}
    found = {}
    for row in spec.rows:
        if row.paper is not None:
            figures = paper.row(spec.paper_table, row.paper)
            scores = {
                column.name: Score(
                    mean=figures.scores[column.paper],
                    digits=DIGITS,
                    in_domain=column.paper in figures.train,
                    best=False,
                )
                for column in columns
                if column.paper is not None
            }
            found[row.key] = Row(key="", label=row.label + suffix, group=row.group, scores=scores)
    marked = [line for _, members in grouped(list(found.values())) for line in mark_best(members)]
    return dict(zip(found, marked, strict=True))


def table_row(
    row: RowSpec,
    columns: Sequence[Column],
    result: RowScores | None,
    *,
    missing: str = "",
    marks: Mapping[str, RowComparison] = MappingProxyType({}),
    costs: Sequence[CostColumn] = (),
    **fields: Any,
) -> Row:
    """A row with its scores, none of them marked as the best.

    Args:
        row: the row of the table's definition.
        columns: the score columns.
        result: its cells; None if it has none.
        missing: why it has none.
        marks: comparisons with its reference, by column.
        costs: the costs shown.
        fields: further fields of :class:`Row`.
    """
    fields |= {
        "key": row.key,
        "label": row.label,
        "group": row.group,
        "trained_on": row.train,
        "full_label": full_label(row),
    }
    if result is None:
        return Row(**fields, scores={}, missing=missing)
    scored = [column for column in columns if column.name in result.rewards]
    intervals = row_intervals(result.scores([column.name for column in scored]))
    known = row_costs(result)
    infos = [cell.info for cell in result.cells]
    return Row(
        **fields,
        method=infos[0].method,
        preset=infos[0].preset,
        seeds=result.seeds,
        scores={
            column.name: Score(
                **vars(interval),
                digits=column.digits,
                in_domain=column.name in row.train,
                best=False,
                mark=marks.get(column.name),
            )
            for column, interval in zip(scored, intervals, strict=True)
        },
        costs={name: known[name] for name in costs if known},
        every_cost=known,
        sources=tuple(
            Source(
                seed=info.seed,
                runs=info.runs,
                iteration=info.checkpoint_iteration,
                protocol=info.protocol.hash,
                origin=origin_key(cell),
                cost=info.cost,
            )
            for cell, info in zip(result.cells, infos, strict=True)
        ),
    )
