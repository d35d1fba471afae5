"""A computed table as the blocks that people see: each has its own columns over the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.evaluation.statistics import human
from reproduce.tables.model import HACKING_LABEL, Column, Number, Row, Table

Cell = Number | str | None
"""None where the row has nothing."""


class Heading(NamedTuple):
    """The heading of a column, and whether it holds numbers."""

    label: str
    numeric: bool = True


@dataclass(frozen=True)
class Block:
    """A block of a table: its rows, with a cell for each heading after the row's name.

    ``suffix`` ends its LaTeX label, and is empty for the scores.
    """

    suffix: str
    title: str
    headings: tuple[Heading, ...]
    lines: tuple[tuple[Row, tuple[Cell, ...]], ...]


def blocks(table: Table, *, aligned: bool = False) -> list[Block]:
    """The scores, their shares of the headroom, what else was measured, the costs, and the paper's
    figures in their own block.

    Args:
        table: the table.
        aligned: whether the first blocks all have the same lines, so that they can be joined. If
            not, the paper's lines below ours are in the block of scores only.
    """
    rows = [row for row in table.lines if aligned or not row.from_paper]
    found = [
        Block(
            "",
            f"{table.title} (profile {table.profile})",
            (*_headings(table.columns), Heading("Seeds"), Heading("Interval", numeric=False)),
            tuple(
                (row, (*_scores(row, table.columns), str(len(row.seeds) or "") or None, row.about))
                for row in table.lines
            ),
        )
    ]
    if shares := table.headroom_columns:
        numbers = ((row, tuple(row.headroom.get(c.name) for c in shares)) for row in rows)
        found.append(Block("-headroom", "Share of headroom", _headings(shares), tuple(numbers)))
    if table.metrics:
        headings = (*_headings(table.metrics), Heading(HACKING_LABEL, numeric=False))
        lines = (
            (row, (*(row.metrics.get(c.name) for c in table.metrics), table.hacking_text(row)))
            for row in rows
        )
        found.append(
            Block("-beside", "Diversity, drift and reward hacking", headings, tuple(lines))
        )
    if table.costs:
        costs = ((row, tuple(human(row.costs.get(c.name)) for c in table.costs)) for row in rows)
        found.append(Block("-cost", "Training cost", _headings(table.costs), tuple(costs)))
    if table.published_source is not None:
        columns = table.published_columns
        figures = tuple((row, _scores(row, columns)) for row in table.published)
        found.append(Block("-paper", table.published_source, _headings(columns), figures))
    return found


def _headings(columns: Sequence[Column]) -> tuple[Heading, ...]:
    return tuple(Heading(column.label) for column in columns)


def _scores(row: Row, columns: Sequence[Column]) -> tuple[Cell, ...]:
    return tuple(row.scores.get(column.name) for column in columns)
