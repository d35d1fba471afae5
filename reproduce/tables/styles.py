"""The scores of a table once more, by the style of the prompts, where their set has styles."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.evaluation.results import STYLE, Cell, RowScores
from reproduce.tables.notes import full_label
from reproduce.tables.spec import ColumnSpec, TableSpec
from reproduce.tables.values import Group, Row, Table, measured_row, select_rows

LEAST_PROMPTS = 2
"""Fewest prompts of a style from which an interval can be had."""


def style_table(spec: TableSpec, cells: Sequence[Cell], *, profile: str) -> Table | None:
    """The table's score columns for the prompts of each style, one group a style.

    Args:
        spec: the table.
        cells: its finished cells.
        profile: the profile the cells were measured under.

    Returns:
        None unless the prompts have two styles or more.

    Raises:
        UserError: the cells do not fit the table or each other.
    """
    results = select_rows(spec, cells)
    styles = {key: found for key, row in results.items() if (found := _styles(row))}
    counts = Counter(style for found in styles.values() for style in set(found.values()))
    if len(counts) < 2:
        return None
    columns = spec.columns_for(profile)
    by_style = spec.model_copy(
        update={
            "name": f"{spec.name}_by_style",
            "title": f"{spec.title}, by style",
            "group_label": "Style",
            "paper_table": None,
            "costs": (),
        }
    )
    chosen = {key: results[key] for key in styles}
    groups = [Group(style, _rows(by_style, columns, chosen, style)) for style in sorted(counts)]
    shown = tuple(group for group in groups if group.rows)
    return Table(by_style, profile, columns, shown, _notes(styles), None)


def _styles(row: RowScores) -> dict[str, str]:
    """Prompt id to style; empty where a cell of the row has no styles."""
    if not all(STYLE in cell.scores for cell in row.cells):
        return {}
    scores = row.cells[0].scores.dropna(subset=[STYLE])
    return dict(zip(scores["prompt_id"], scores[STYLE], strict=True))


def _rows(
    spec: TableSpec, columns: Sequence[ColumnSpec], results: Mapping[str, RowScores], style: str
) -> tuple[Row, ...]:
    rows = []
    for row in spec.rows:
        part = _only(results[row.key], style) if row.key in results else None
        if part is not None:
            named = row.model_copy(update={"label": full_label(row)})
            rows.append(measured_row(named, spec, columns, part))
    return tuple(rows)


def _only(row: RowScores, style: str) -> RowScores | None:
    """The row on the prompts of one style; None where they are too few."""
    prompts = tuple(sorted(one for one, name in _styles(row).items() if name == style))
    if len(prompts) < LEAST_PROMPTS:
        return None
    cells = tuple(
        replace(cell, scores=cell.scores[cell.scores["prompt_id"].isin(prompts)], metrics=None)
        for cell in row.cells
    )
    return RowScores(row.row, cells, prompts)


def _notes(styles: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """How many prompts each style has, and which styles have too few."""
    sizes: dict[str, set[int]] = {}
    for found in styles.values():
        for style, count in Counter(found.values()).items():
            sizes.setdefault(style, set()).add(count)
    texts = [
        f"{style} {' or '.join(str(count) for count in sorted(counts))}"
        for style, counts in sorted(sizes.items())
    ]
    notes = [f"Prompts: {', '.join(texts)}."]
    few = [style for style, counts in sorted(sizes.items()) if max(counts) < LEAST_PROMPTS]
    if few:
        notes.append(f"Left out, with a single prompt: {', '.join(few)}.")
    return tuple(notes)
