"""Tables of the page: boxes with what they are sorted by, made column by column."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from benchmarks.evaluation.statistics import NOTHING, human

Item = TypeVar("Item")


@dataclass(frozen=True)
class Box:
    """One cell of a table.

    Attributes:
        text: what is read.
        sort: what it is sorted by; None comes last in either direction.
        interval: a second line.
        notes: signs after the text, each with what it means.
        strong: the best of its group.
        kind: how it is set: ``number``, ``label``, ``code``, ``gap``, ``warning`` or ``text``.
        link: the anchor that the text leads to.
        details: names and values, folded away.
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
class Heading:
    """The head of a column."""

    label: str
    numeric: bool = False


@dataclass(frozen=True)
class Column(Generic[Item]):
    """A column: its head, and the box that it has for each item of the table."""

    label: str
    box: Callable[[Item], Box]
    numeric: bool = False


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        caption: what it shows, in a few words.
        columns: the heads.
        rows: as many boxes as there are columns, each.
        notes: sentences below.
        anchors: an id for each row, or none.
        begins: the rows that begin a group, where no other order is chosen.
    """

    caption: str
    columns: tuple[Heading, ...]
    rows: tuple[tuple[Box, ...], ...]
    notes: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    begins: frozenset[int] = frozenset()

    @property
    def slotted(self) -> frozenset[int]:
        """The columns of figures of which any has signs after it."""
        boxes = ((i, box) for row in self.rows for i, box in enumerate(row))
        return frozenset(i for i, box in boxes if box.notes and box.kind == "number")


def make_grid(
    caption: str,
    columns: Sequence[Column[Item]],
    items: Iterable[Item],
    notes: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> Grid:
    """A table with a row for each item; ``groups`` names the group of each."""
    return Grid(
        caption,
        tuple(Heading(column.label, column.numeric) for column in columns),
        tuple(tuple(column.box(item) for column in columns) for item in items),
        tuple(notes),
        begins=frozenset(i for i in range(1, len(groups)) if groups[i] != groups[i - 1]),
    )


def anchor(*parts: str) -> str:
    """An id for a part of the page, the same each time."""
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)


def number(value: float | None, text: str | None = None) -> Box:
    """A figure that is sorted by its value; without a text a count or a number of seconds."""
    return Box(human(value) if text is None else text, value, kind="number")


def text_box(text: str | None, kind: str = "text") -> Box:
    """Words that are sorted as such; a dash for none."""
    shown = text or NOTHING
    return Box(shown, shown.lower(), kind=kind)
