"""A table's scores by prompt style, for prompt sets with styles."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from benchmarks.evaluation.results import STYLE, RowScores
from reproduce.experiment.table import TableSpec
from reproduce.tables.model import Table
from reproduce.tables.notes import full_label, legend
from reproduce.tables.rows import score_columns, table_row

LEAST_PROMPTS = 2
"""Fewest prompts of a style for an interval."""


def style_table(spec: TableSpec, results: Mapping[str, RowScores], profile: str) -> Table | None:
    """The table's scores on the prompts of each style, one group per style.

    None unless the prompts have at least two styles.
    """
    styles = {key: found for key, row in results.items() if (found := _styles(row))}
    counts = Counter(style for found in styles.values() for style in set(found.values()))
    if len(counts) < 2:
        return None
    columns = score_columns(spec)
    parts = [
        (row.model_copy(update={"label": full_label(row), "group": style}), part)
        for style in sorted(counts)
        for row in spec.rows
        if row.key in styles and (part := _only(results[row.key], style)) is not None
    ]
    rows = tuple(table_row(row, columns, part) for row, part in parts)
    return Table(
        name=f"{spec.name}_by_style",
        title=f"{spec.title}, by style",
        profile=profile,
        columns=columns,
        rows=rows,
        protocols=tuple({one.protocol.hash: one.protocol for one in results.values()}.values()),
        notes=_notes(styles),
        group_label="Style",
        row_label=spec.row_label,
        legend=legend(rows, (), columns),
    )


def _styles(row: RowScores) -> dict[str, str]:
    """Prompt id to style; empty if a cell of the row has no styles."""
    if not all(STYLE in cell.scores for cell in row.cells):
        return {}
    scores = row.cells[0].scores.dropna(subset=[STYLE])
    return dict(zip(scores["prompt_id"], scores[STYLE], strict=True))


def _only(row: RowScores, style: str) -> RowScores | None:
    """The row on the prompts of one style; None if they are too few."""
    prompts = tuple(sorted(one for one, name in _styles(row).items() if name == style))
    if len(prompts) < LEAST_PROMPTS:
        return None
    cells = tuple(
        replace(cell, scores=cell.scores[cell.scores["prompt_id"].isin(prompts)], metrics=None)
        for cell in row.cells
    )
    return RowScores(row.row, cells, prompts)


def _notes(styles: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """The number of prompts per style, and the styles with too few."""
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
        notes.append(f"Omitted, with a single prompt: {', '.join(few)}.")
    return tuple(notes)
