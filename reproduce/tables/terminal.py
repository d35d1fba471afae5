"""A computed table on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.text import Text

from benchmarks.evaluation.statistics import NOTHING
from g2rpo.terminal import PlainTable, literal, wide_console
from reproduce.tables.blocks import Block, Cell, blocks
from reproduce.tables.model import IN_DOMAIN, Number, Score, Table


def print_table(table: Table, console: Console | None = None) -> None:
    """Prints every block of a table, with its notes before the paper's figures."""
    console = console or wide_console()
    missing = [row for row in table.rows if row.missing is not None]
    notes = [f"{row.full_label}: missing, {row.missing}." for row in missing]
    for block in (shown := blocks(table)):
        if block.suffix != "-paper":
            console.print(_grid(table, block))
    for note in (*notes, *table.all_notes):
        console.print(literal(f"· {note}", "dim"))
    if table.published_source is not None:
        console.print(_grid(table, shown[-1]))


def _grid(table: Table, block: Block) -> PlainTable:
    title = literal(block.title)
    grid = PlainTable(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    if table.grouped:
        grid.add_column(table.group_label)
    grid.add_column(table.row_label)
    for label, numeric in block.headings:
        grid.add_column(label, justify="right" if numeric else "left")
    groups = [row.group for row, _ in block.lines]
    for index, (row, cells) in enumerate(block.lines):
        texts = [literal(row.label, "italic" if row.from_paper else ""), *map(_cell, cells)]
        if row.missing is not None and not block.suffix:
            texts[-1] = Text("missing", style="yellow")
        if table.grouped:
            begins = index == 0 or groups[index - 1] != row.group
            texts.insert(0, literal((row.group or NOTHING) if begins else ""))
        ends = index + 1 == len(groups) or groups[index + 1] != row.group
        grid.add_row(*texts, end_section=ends)
    return grid


def _cell(cell: Cell) -> Text:
    if cell is None:
        return Text(NOTHING, style="dim")
    if not isinstance(cell, Number):
        return literal(cell)
    score = cell if isinstance(cell, Score) else None
    text = Text(cell.text, style="bold" if score is not None and score.best else "")
    if score is not None and score.in_domain:
        text.append(IN_DOMAIN, style="cyan")
    if cell.ends is not None:
        text.append(f"\n{cell.ends}", style="not bold dim")
    return text
