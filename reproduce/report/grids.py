"""Sortable tables of the page, built column by column."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from benchmarks.evaluation.statistics import NOTHING, human
from reproduce.tables.blocks import Heading

Item = TypeVar("Item")


@dataclass(frozen=True)
class Box:
    """One cell of a table.

    Attributes:
        text: the text shown.
        sort: the value to sort by; None sorts last in either direction.
        interval: a second line.
        notes: marks after the text, each with its meaning.
        strong: whether it is the best of its group.
        kind: ``number``, ``label``, ``code``, ``gap``, ``warning`` or ``text``.
        link: the anchor that the text links to.
        details: names and values, collapsed.
        shares: parts of a bar, each with its name and its share of the longest bar.
    """

    text: str
    sort: float | str | None = None
    interval: str | None = None
    notes: tuple[tuple[str, str], ...] = ()
    strong: bool = False
    kind: str = "text"
    link: str | None = None
    details: tuple[tuple[str, str], ...] = ()
    shares: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Column(Generic[Item]):
    """A column: its heading, and a function from an item to its box."""

    label: str
    box: Callable[[Item], Box]
    numeric: bool = False


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        caption: what it shows, in a few words.
        columns: the headings.
        rows: one box per column.
        notes: sentences below.
        anchors: an id per row, or none.
        begins: the rows that begin a group in the original order.
    """

    caption: str
    columns: tuple[Heading, ...]
    rows: tuple[tuple[Box, ...], ...]
    notes: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    begins: frozenset[int] = frozenset()

    @property
    def slotted(self) -> frozenset[int]:
        """The numeric columns with a mark in any row."""
        boxes = ((i, box) for row in self.rows for i, box in enumerate(row))
        return frozenset(i for i, box in boxes if box.notes and box.kind == "number")


def make_grid(
    caption: str,
    columns: Sequence[Column[Item]],
    items: Iterable[Item],
    notes: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> Grid:
    """A table with one row per item; ``groups`` names the group of each."""
    return Grid(
        caption,
        tuple(Heading(column.label, column.numeric) for column in columns),
        tuple(tuple(column.box(item) for column in columns) for item in items),
        tuple(notes),
        begins=frozenset(i for i in range(1, len(groups)) if groups[i] != groups[i - 1]),
    )


def anchor(*parts: str) -> str:
    """A stable id for a part of the page."""
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)


def number(value: float | None, text: str | None = None) -> Box:
    """A figure, sorted by its value; the default text is a short count."""
    return Box(human(value) if text is None else text, value, kind="number")


def seed_box(seed: int | None) -> Box:
    """A training seed, with all its digits."""
    return number(seed, NOTHING if seed is None else str(seed))


def text_box(text: str | None, kind: str = "text") -> Box:
    """A text, sorted alphabetically; a dash for None."""
    shown = text or NOTHING
    return Box(shown, shown.lower(), kind=kind)
