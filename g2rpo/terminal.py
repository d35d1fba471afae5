"""Consoles and tables that print text literally and never truncate numbers."""

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

from g2rpo.text import visible

_LONGEST_WORD = 16
"""Longer words may be broken; numbers are shorter."""


def literal(text: str, style: StyleType = "") -> Text:
    """``text`` for rich, without markup, emoji names or control characters."""
    return Text(visible(text), style)


def wide_console(*, stderr: bool = False) -> Console:
    """A console without markup, and of unlimited width if it is not a terminal."""
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    return console


class PlainTable(Table):
    """A table of literal text whose columns wrap between words.

    Only words of more than 16 characters are broken. If the terminal is still too narrow, each row
    is printed as lines of ``heading: value``.
    """

    def add_column(self, header: RenderableType = "", *args: Any, **options: Any) -> None:
        """Adds a column; see :meth:`rich.table.Table.add_column`."""
        super().add_column(_as_text(header), *args, overflow="fold", **options)

    def add_row(
        self,
        *renderables: RenderableType | None,
        style: StyleType | None = None,
        end_section: bool = False,
    ) -> None:
        """Adds a row of strings or :class:`rich.text.Text`."""
        cells = (_as_text(cell) for cell in renderables)
        super().add_row(*cells, style=style, end_section=end_section)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        texts = [[_as_text(cell) for cell in (c.header, *c.cells)] for c in self.columns]
        lines = [[line.plain for text in column for line in text.split()] for column in texts]
        natural = [max(map(cell_len, column), default=0) for column in lines]
        least = [
            max((min(cell_len(word), _LONGEST_WORD) for line in column for word in line.split()),
                default=0)
            for column in lines
        ]  # fmt: skip
        self._set_widths(natural)
        between = self.__rich_measure__(console, options.update_width(10**6)).maximum - sum(natural)
        room = options.max_width - between
        if sum(least) > room:
            yield from self._stacked(texts)
            return
        self._set_widths(_shared_out(least, natural, room))
        yield from super().__rich_console__(console, options)

    def _set_widths(self, widths: Sequence[int]) -> None:
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width

    def _stacked(self, texts: Sequence[Sequence[Text]]) -> RenderResult:
        """The layout for narrow terminals."""
        if self.title:
            yield self.title
        first = Text()
        for index, row in enumerate(self.rows, start=1):
            # An empty first cell repeats the one above it.
            first = texts[0][index] or first
            for place, column in enumerate(texts):
                header, cell = column[0], first if place == 0 else column[index]
                cell = Text(" ").join(cell.split())
                if cell:
                    line = Text.assemble(header, ": ", cell) if header else cell
                    line.stylize(row.style or "")
                    yield line
            yield Text()
        if self.caption:
            yield self.caption


def plain_table(*columns: str, right: Sequence[str] = ()) -> PlainTable:
    """A table without lines; ``right`` names the right-aligned columns."""
    table = PlainTable(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def _as_text(cell: RenderableType | None) -> Text:
    return cell if isinstance(cell, Text) else literal(str(cell or ""))


def _shared_out(least: Sequence[int], natural: Sequence[int], room: int) -> list[int]:
    """Widths between ``least`` and ``natural`` with a sum of at most ``room``."""
    widths, spare = list(least), room - sum(least)
    order = sorted(range(len(least)), key=lambda column: natural[column] - least[column])
    for done, column in enumerate(order):
        more = min(natural[column] - least[column], spare // (len(order) - done))
        widths[column] += more
        spare -= more
    return widths
