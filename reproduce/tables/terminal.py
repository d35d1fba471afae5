"""A computed table on the terminal."""

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.text import Text

from benchmarks.evaluation.statistics import NOTHING, human
from g2rpo.terminal import PlainTable, literal, wide_console
from reproduce.tables.model import (
    HACKING_LABEL,
    IN_DOMAIN,
    Column,
    Number,
    Row,
    Score,
    Table,
    grouped,
)

Heads = Sequence[tuple[str, str]]
"""Labels with how they are justified."""
Groups = Sequence[tuple[str, Sequence[Row]]]


def print_table(table: Table, console: Console | None = None) -> None:
    """Prints scores, metrics, costs, notes and the paper's block."""
    console = console or wide_console()
    ours = [(name, [row for row in rows if not row.from_paper]) for name, rows in table.groups]
    heads = [*_figures(table.columns), ("Seeds", "right"), ("Interval", "left")]
    title = f"{table.title} (profile {table.profile})"
    console.print(_grid(table, title, heads, table.groups, lambda row: _scores(table, row)))
    if table.metrics:
        heads = [*_figures(table.metrics), (HACKING_LABEL, "left")]
        console.print(
            _grid(table, "Beside the rewards", heads, ours, lambda row: _metrics(table, row))
        )
    if table.costs:
        console.print(
            _grid(
                table,
                "Cost of training",
                _figures(table.costs),
                ours,
                lambda row: [human(row.costs.get(cost.name)) for cost in table.costs],
            )
        )
    for note in (*_missing(table), *table.all_notes):
        console.print(literal(f"· {note}", "dim"))
    if table.published_source is not None:
        columns, groups = table.published_columns, list(grouped(table.published))
        console.print(
            _grid(
                table,
                table.published_source,
                _figures(columns),
                groups,
                lambda row: [_number(row.scores.get(column.name)) for column in columns],
            )
        )


def _figures(columns: Sequence[Column]) -> list[tuple[str, str]]:
    return [(column.label, "right") for column in columns]


def _grid(
    table: Table,
    title: str,
    heads: Heads,
    groups: Groups,
    cells: Callable[[Row], Sequence[str | Text]],
) -> PlainTable:
    """A line for each row: its name, then what ``cells`` gives of it."""
    grid = PlainTable(title=literal(title), box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    if table.grouped:
        grid.add_column(table.group_label)
    grid.add_column(table.row_label)
    for label, justify in heads:
        grid.add_column(label, justify=justify)
    for group, rows in groups:
        for index, row in enumerate(rows):
            first = [literal(row.label, "italic" if row.from_paper else "")]
            if table.grouped:
                first.insert(0, literal((group or NOTHING) if index == 0 else ""))
            grid.add_row(*first, *cells(row), end_section=index == len(rows) - 1)
    return grid


def _scores(table: Table, row: Row) -> list[str | Text]:
    label = Text(row.about or NOTHING)
    if row.missing is not None:
        label = Text("missing", style="yellow")
    numbers = [_number(row.scores.get(column.name)) for column in table.columns]
    return [*numbers, str(len(row.seeds) or NOTHING), label]


def _metrics(table: Table, row: Row) -> list[str | Text]:
    numbers = [_number(row.metrics.get(column.name)) for column in table.metrics]
    return [*numbers, table.hacking_text(row)]


def _number(number: Number | None) -> Text:
    if number is None:
        return Text(NOTHING, style="dim")
    score = number if isinstance(number, Score) else None
    text = Text(number.text, style="bold" if score is not None and score.best else "")
    if score is not None and score.in_domain:
        text.append(IN_DOMAIN, style="cyan")
    if number.ends is not None:
        text.append(f"\n{number.ends}", style="not bold dim")
    return text


def _missing(table: Table) -> list[str]:
    missing = [row for row in table.rows if row.missing is not None]
    return [f"{row.full_label}: missing, {row.missing}." for row in missing]
