"""Computes a table: its numbers, comparisons and notes, once for all formats."""

from collections.abc import Mapping, Sequence

from benchmarks.evaluation.results import Cell, RowScores
from benchmarks.evaluation.statistics import NOTHING
from reproduce.experiment.table import TableSpec
from reproduce.tables.comparisons import ComparedRows, row_comparisons, row_marks
from reproduce.tables.headroom import common_scale, headroom_numbers
from reproduce.tables.model import COST_LABELS, Column, Row, Table, grouped
from reproduce.tables.notes import NOT_RUN, Gap, legend, metric_legend, missing_reason, table_notes
from reproduce.tables.paper import load_paper_tables
from reproduce.tables.planned import planned_comparisons, planned_notes
from reproduce.tables.references import PAPER, cited
from reproduce.tables.rows import (
    PAPER_COLUMNS,
    mark_best,
    metric_columns,
    origin_key,
    published_rows,
    row_metrics,
    score_columns,
    select_rows,
    table_row,
)
from reproduce.tables.styles import style_table


def compute_table(
    spec: TableSpec,
    cells: Sequence[Cell],
    profile: str,
    gaps: Sequence[Gap] = (),
) -> Table:
    """Computes everything that a table shows.

    Args:
        spec: the table's rows and columns.
        cells: finished cells of this profile; cells of other tables' rows are ignored.
        profile: the profile the cells were measured under. The paper's figures are shown next to
            ours if it trains the paper's model, else in their own block.
        gaps: why rows and seeds are missing; the default reason is ``not run``.

    Raises:
        UserError: the cells do not match the table or each other.
    """
    paper = load_paper_tables()
    columns, same_model = score_columns(spec), spec.paper_model
    results = select_rows(spec, cells)
    published = published_rows(spec, paper, columns if same_model else PAPER_COLUMNS)
    spec, left_out = _without_groups_not_run(spec, results, gaps)
    compared = ComparedRows(results, [column.name for column in columns])
    rows = _rows(spec, columns, compared, gaps, published if same_model else {})
    theirs, block = tuple(published.values()), spec.paper_table is not None and not same_model
    scale, scale_notes = common_scale(spec, results)
    measured = {} if scale is None else scale.measured_rows(spec, results)
    planned = planned_comparisons(spec, measured, scale)
    if scale is not None and scale.headroom:
        rows = [_with_headroom(row, measured.get(row.key)) for row in rows]
    metrics = metric_columns(rows)
    notes = (
        *left_out,
        *scale_notes,
        *table_notes(spec, {c.name: c.label for c in columns}, results, gaps),
    )
    methods = dict.fromkeys(result.cells[0].info.method for result in results.values())
    keys = cited(methods, (c.name for c in columns), (c.name for c in metrics))
    used = [cell for result in results.values() for cell in result.cells]
    table = Table(
        name=spec.name,
        title=spec.title,
        profile=profile,
        columns=columns,
        measures=() if scale is None else scale.columns,
        metrics=metrics,
        costs=tuple(Column(name=name, label=COST_LABELS[name]) for name in spec.costs),
        rows=tuple(rows),
        comparisons=(*planned, *row_comparisons(spec, compared, rows, paper)),
        published=theirs,
        published_source=paper.caption if block else None,
        protocols=tuple({cell.info.protocol.hash: cell.info.protocol for cell in used}.values()),
        origins={origin_key(cell): cell.info.provenance for cell in used},
        notes=notes if block or spec.paper_table is None else (*notes, paper.note),
        references=tuple(dict.fromkeys([PAPER, *keys] if block or theirs else keys)),
        group_label=spec.group_label,
        row_label=spec.row_label,
        legend=(*legend(rows, theirs, columns), *([] if scale is None else [scale.note])),
        metric_legend=metric_legend(metrics),
        published_columns=PAPER_COLUMNS if block else (),
        same_model=same_model,
        styles=style_table(spec, results, profile),
    )
    return table.model_copy(update={"notes": (*planned_notes(table), *table.notes)})


def _without_groups_not_run(
    spec: TableSpec, results: Mapping[str, RowScores], gaps: Sequence[Gap]
) -> tuple[TableSpec, list[str]]:
    """The table without trained groups of which nothing was run, if another was, and a note."""
    groups = [
        (name, rows)
        for name, rows in spec.groups()
        if results.keys().isdisjoint(row.key for row in rows)
        and all(row.train and missing_reason(row.key, gaps) == NOT_RUN for row in rows)
    ]
    trained = any(row.train and row.key in results for row in spec.rows)
    if not groups or not trained:
        return spec, []
    absent = {row.key for _, rows in groups for row in rows}
    kept = {
        "rows": tuple(row for row in spec.rows if row.key not in absent),
        "focus": tuple(key for key in spec.focus if key not in absent),
        "primary": {key: others for key, others in spec.primary.items() if key not in absent},
        "baseline": None if spec.baseline in absent else spec.baseline,
    }
    names = [f"{spec.group_label} {name or NOTHING}: {len(rows)} rows" for name, rows in groups]
    return spec.model_copy(update=kept), [f"Not run: {'; '.join(names)}."]


def _with_headroom(row: Row, measured: RowScores | None) -> Row:
    if measured is None:
        return row
    return row.model_copy(update={"headroom": headroom_numbers(measured)})


def _rows(
    spec: TableSpec,
    columns: Sequence[Column],
    compared: ComparedRows,
    gaps: Sequence[Gap],
    published: Mapping[str, Row],
) -> list[Row]:
    """The rows, with the best score of each group marked."""
    results = compared.results
    metrics = row_metrics(results)
    rows = []
    for row in spec.rows:
        line = table_row(
            row,
            columns,
            results.get(row.key),
            missing=missing_reason(row.key, gaps),
            marks=row_marks(spec, row, compared),
            metrics=metrics.get(row.key, {}),
            costs=spec.costs,
            published=published.get(row.key),
        )
        if any(metrics.values()):
            hacking = compared.hacking(row.key, spec.baseline, line.about)
            line = line.model_copy(update={"reward_hacking": hacking})
        rows.append(line)
    return [row for _, members in grouped(rows) for row in mark_best(members)]
