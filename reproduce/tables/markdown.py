"""A computed table as Markdown."""

import re
from collections.abc import Iterable, Sequence

from benchmarks.evaluation.statistics import NOTHING
from g2rpo.text import visible
from reproduce.tables.blocks import Block, Cell, Heading, blocks
from reproduce.tables.model import IN_DOMAIN, Number, Row, Score, Table


def to_markdown(table: Table) -> str:
    """The table, its notes and, where the paper's figures are not comparable, their own table."""
    joined, paper = blocks(table, aligned=True), []
    if table.published_source is not None:
        *joined, block = joined
        paper = [f"**{markdown_escape(block.title)}**", _grid(table, [block])]
    title = f"### {markdown_escape(table.title)} (profile `{table.profile}`)"
    notes = "\n".join(f"- {markdown_escape(note)}" for note in table.all_notes)
    return "\n\n".join([title, _grid(table, joined), notes, *paper]) + "\n"


def _grid(table: Table, joined: Sequence[Block]) -> str:
    """One table of several blocks that have the same lines."""
    named = [table.group_label, table.row_label][not table.grouped :]
    heads = [*(Heading(name, numeric=False) for name in named)]
    heads += [heading for block in joined for heading in block.headings]
    lines = []
    for parts in zip(*(block.lines for block in joined), strict=True):
        row = parts[0][0]
        cells = [_cell(cell) for _, cells in parts for cell in cells]
        if row.missing is not None:
            cells[0] = f"*missing: {markdown_escape(row.missing)}*"
        lines.append([*_name(table, row), *cells])
    return markdown_table([(label, "---:" if n else "---") for label, n in heads], lines)


def _name(table: Table, row: Row) -> Iterable[str]:
    return map(markdown_escape, [row.group, row.label][not table.grouped :])


def _cell(cell: Cell) -> str:
    if not isinstance(cell, Number):
        return markdown_escape(cell or NOTHING)
    text = cell.text
    if isinstance(cell, Score):
        text = (f"**{text}**" if cell.best else text) + (IN_DOMAIN if cell.in_domain else "")
    return text if cell.ends is None else f"{text}<br><sub>{cell.ends}</sub>"


def markdown_table(heads: Sequence[tuple[str, str]], lines: Sequence[Sequence[str]]) -> str:
    """A table with headings and their alignment; ``lines`` are escaped already."""
    texts = [[markdown_escape(label) for label, _ in heads], *lines]
    first, *rest = (f"| {' | '.join(cells)} |" for cells in texts)
    return "\n".join([first, f"|{'|'.join(alignment for _, alignment in heads)}|", *rest])


_MARKDOWN = re.compile(
    r"[\\`*_|<>\[\]~$]"
    r"|&(?=[#\w])"  # an entity
    r"|^[-+#=](?=[-+#=\s]|$)"  # a list, a heading, a rule
)


def markdown_escape(text: str) -> str:
    """Escapes ``text`` for a Markdown table cell or sentence."""
    one_line = visible(" ".join(text.split()))
    # A number in front would begin a list.
    return re.sub(r"^(\d+)([.)]\s)", r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", one_line))
