"""Tables like the paper's, from finished cells: Markdown, CSV, LaTeX, JSON and the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.text import Text

from benchmarks.evaluation.results import Cell
from g2rpo.config import load_yaml, validate
from g2rpo.errors import UserError
from g2rpo.files import atomic_write_text
from g2rpo.terminal import PlainTable, literal, wide_console
from reproduce.tables.document import references_of, to_json
from reproduce.tables.formats import (
    IN_DOMAIN,
    NOTHING,
    hacking_text,
    human,
    interval_text,
    legend,
    metric_labels,
    metric_values,
    paper_csv,
    seeds_text,
    to_csv,
    to_latex,
    to_markdown,
)
from reproduce.tables.notes import Gap
from reproduce.tables.paper import load_paper_tables
from reproduce.tables.references import bibliography
from reproduce.tables.spec import COST_LABELS, TableSpec
from reproduce.tables.styles import style_table
from reproduce.tables.values import Row, Table, Value, build_table

__all__ = ["Gap", "TableSpec", "load_table_spec", "print_table", "render_table"]


def load_table_spec(experiment: Path) -> TableSpec:
    """Reads the ``table`` section of an experiment's YAML.

    Raises:
        UserError: there is none, or it is malformed; the message names the key.
    """
    data = load_yaml(experiment)
    if "table" not in data:
        raise UserError(f"{experiment}: no section 'table'; add one with rows and columns")
    return validate(TableSpec, data["table"], f"{experiment}: table")


def render_table(
    spec: TableSpec,
    cells: Sequence[Cell],
    *,
    profile: str,
    output: Path,
    gaps: Sequence[Gap] = (),
) -> dict[str, Path]:
    """Writes a table in every format.

    Args:
        spec: what it shows.
        cells: finished cells of this profile; those of other tables' rows are left out.
        profile: the profile the cells were measured under. Under those that train the paper's own
            model the paper's figures stand next to ours, else in a block of their own.
        output: the folder for ``<name>.md``, ``.csv``, ``.tex``, ``.json``, ``.bib`` and
            ``<name>_paper.csv``, and for ``<name>_by_style.md`` and ``.csv`` where the prompts have
            styles.
        gaps: reasons for rows and seeds that are missing.

    Returns:
        Format (``markdown``, ``csv``, ``latex``, ``json``, ``bibtex``, ``paper_csv``, ``by_style``,
        ``by_style_csv``) to the file written.

    Raises:
        UserError: the cells do not fit the table or each other.
    """
    table = build_table(spec, cells, profile=profile, paper=load_paper_tables(), gaps=gaps)
    texts = {
        "markdown": (f"{spec.name}.md", to_markdown(table)),
        "csv": (f"{spec.name}.csv", to_csv(table)),
        "latex": (f"{spec.name}.tex", to_latex(table)),
        "json": (f"{spec.name}.json", to_json(table, cells)),
        "bibtex": (f"{spec.name}.bib", bibliography(references_of(table, cells))),
    }
    published = paper_csv(table)
    if published is not None:
        texts["paper_csv"] = (f"{spec.name}_paper.csv", published)
    styles = style_table(spec, cells, profile=profile)
    if styles is not None:
        texts["by_style"] = (f"{styles.spec.name}.md", to_markdown(styles))
        texts["by_style_csv"] = (f"{styles.spec.name}.csv", to_csv(styles))
    for name, text in texts.values():
        atomic_write_text(output / name, text)
    return {kind: output / name for kind, (name, _) in texts.items()}


def print_table(
    spec: TableSpec,
    cells: Sequence[Cell],
    *,
    profile: str,
    gaps: Sequence[Gap] = (),
    console: Console | None = None,
) -> None:
    """Prints scores, metrics, costs, notes and the paper's block to the terminal.

    Arguments and errors are those of :func:`render_table`.
    """
    table = build_table(spec, cells, profile=profile, paper=load_paper_tables(), gaps=gaps)
    console = console or wide_console()
    console.print(_score_table(table))
    if table.metrics:
        console.print(_metric_table(table))
    if spec.costs:
        console.print(_cost_table(table))
    for note in (*_gaps(table), *legend(table), *table.notes):
        console.print(literal(f"· {note}", "dim"))
    if table.paper is not None:
        console.print(_paper_table(table))


def _gaps(table: Table) -> list[str]:
    missing = [(g, row) for g in table.groups for row in g.rows if row.gap is not None]
    names = [f"{row.label} ({g.label})" if g.label else row.label for g, row in missing]
    return [f"{name}: missing, {row.gap}." for name, (_, row) in zip(names, missing, strict=True)]


def _value_text(value: Value) -> Text:
    if value.shown is None:
        return Text(NOTHING, style="dim")
    text = Text(value.shown, style="bold" if value.best else "")
    if value.in_domain:
        text.append(IN_DOMAIN, style="cyan")
    interval = interval_text(value)
    if interval is not None:
        text.append(f"\n{interval}", style="not bold dim")
    return text


def _first_texts(table: Table, group: str, row: Row, first: bool) -> list[Text]:
    label = literal(row.label, "italic" if row.from_paper else "")
    return [literal((group or NOTHING) if first else ""), label] if _grouped(table) else [label]


def _grouped(table: Table) -> bool:
    return any(group.label for group in table.groups)


def _empty(table: Table, title: str) -> PlainTable:
    grid = PlainTable(title=literal(title), box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    if _grouped(table):
        grid.add_column(table.spec.group_label)
    grid.add_column(table.spec.row_label)
    return grid


def _add_figures(grid: PlainTable, label: str) -> None:
    grid.add_column(label, justify="right")


def _score_table(table: Table) -> PlainTable:
    grid = _empty(table, f"{table.spec.title} (profile {table.profile})")
    for column in table.columns:
        _add_figures(grid, column.label)
    grid.add_column("Seeds", justify="right")
    grid.add_column("Interval")
    for group in table.groups:
        for index, row in enumerate(group.rows):
            values = [_value_text(value) for value in row.values]
            label = Text(row.interval_label or NOTHING)
            if row.gap is not None:
                label = Text("missing", style="yellow")
            first = _first_texts(table, group.label, row, index == 0)
            last = index == len(group.rows) - 1
            grid.add_row(*first, *values, seeds_text(row), label, end_section=last)
    return grid


def _metric_table(table: Table) -> PlainTable:
    grid = _empty(table, "Beside the rewards")
    for label in metric_labels(table)[:-1]:
        _add_figures(grid, label)
    grid.add_column(metric_labels(table)[-1])
    for group in table.groups:
        rows = [row for row in group.rows if not row.from_paper]
        for index, row in enumerate(rows):
            first = _first_texts(table, group.label, row, index == 0)
            values = [_value_text(value) for value in metric_values(table, row)]
            hacking = hacking_text(table, row)
            grid.add_row(*first, *values, hacking, end_section=index == len(rows) - 1)
    return grid


def _cost_table(table: Table) -> PlainTable:
    grid = _empty(table, "Cost of training")
    for cost in table.spec.costs:
        _add_figures(grid, COST_LABELS[cost])
    for group in table.groups:
        rows = [row for row in group.rows if not row.from_paper]
        for index, row in enumerate(rows):
            first = _first_texts(table, group.label, row, index == 0)
            costs = [human(cost) for cost in row.costs]
            grid.add_row(*first, *costs, end_section=index == len(rows) - 1)
    return grid


def _paper_table(table: Table) -> PlainTable:
    assert table.paper is not None
    grid = _empty(table, table.paper.caption)
    for column in table.paper.columns:
        _add_figures(grid, column)
    for group in table.paper.groups:
        for index, row in enumerate(group.rows):
            first = _first_texts(table, group.label, row, index == 0)
            values = [_value_text(value) for value in row.values]
            grid.add_row(*first, *values, end_section=index == len(group.rows) - 1)
    return grid
