"""Computes a table: all of its numbers, comparisons and notes, once for every format."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.evaluation.results import Cell
from benchmarks.evaluation.statistics import ALPHA, Comparison, corrected
from reproduce.experiment.table import RowSpec, TableSpec
from reproduce.tables.labels import COST_LABELS
from reproduce.tables.model import (
    UNCLEAR,
    Column,
    Mark,
    Number,
    Question,
    Row,
    RowComparison,
    Table,
    grouped,
    interval_fields,
)
from reproduce.tables.notes import (
    Gap,
    full_label,
    legend,
    metric_legend,
    missing_reason,
    table_notes,
)
from reproduce.tables.paired import ComparedRows, alike, improvements
from reproduce.tables.paper import DIGITS, PaperTables, load_paper_tables
from reproduce.tables.references import PAPER, cited
from reproduce.tables.rows import (
    PAPER_COLUMNS,
    cost_ratios,
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
    paper: PaperTables | None = None,
) -> Table:
    """Computes everything that a table shows.

    Args:
        spec: what it shows.
        cells: finished cells of this profile; those of other tables' rows are left out.
        profile: the profile the cells were measured under. Under those that train the paper's own
            model the paper's figures stand next to ours, else in a block of their own.
        gaps: reasons for rows and seeds that are missing; without one the reason is ``not run``.
        paper: the paper's figures; None loads the project's own copy.

    Raises:
        UserError: the cells do not fit the table or each other.
    """
    paper = load_paper_tables() if paper is None else paper
    columns, same_model = score_columns(spec), spec.paper_model
    results = select_rows(spec, cells)
    published = published_rows(spec, paper, columns if same_model else PAPER_COLUMNS)
    compared = ComparedRows(results, [column.name for column in columns])
    rows = _rows(spec, columns, compared, gaps)
    if same_model:
        rows = [row.model_copy(update={"published": published.get(row.key)}) for row in rows]
    theirs, block = tuple(published.values()), spec.paper_table is not None and not same_model
    metrics = metric_columns(rows)
    notes = table_notes(spec, {c.name: c.label for c in columns}, results, gaps)
    methods = dict.fromkeys(result.cells[0].info.method for result in results.values())
    used = [cell for result in results.values() for cell in result.cells]
    return Table(
        name=spec.name,
        title=spec.title,
        profile=profile,
        columns=columns,
        metrics=metrics,
        costs=tuple(Column(name=name, label=COST_LABELS[name]) for name in spec.costs),
        rows=tuple(rows),
        comparisons=tuple(_comparisons(spec, compared, rows, {c.name: c for c in columns}, paper)),
        published=theirs,
        published_source=paper.caption if block else None,
        protocols=tuple({cell.info.protocol.hash: cell.info.protocol for cell in used}.values()),
        origins={origin_key(cell): cell.info.provenance for cell in used},
        notes=notes if block or spec.paper_table is None else (*notes, paper.note),
        references=_references(methods, columns, metrics, paper=block or bool(theirs)),
        group_label=spec.group_label,
        row_label=spec.row_label,
        legend=legend(rows, theirs, columns),
        metric_legend=metric_legend(metrics),
        published_columns=PAPER_COLUMNS if block else (),
        same_model=same_model,
        styles=style_table(spec, results, profile),
    )


def _references(
    methods: Iterable[str], columns: Sequence[Column], metrics: Sequence[Column], *, paper: bool
) -> tuple[str, ...]:
    """The keys of all that a table shows."""
    keys = cited(methods, (c.name for c in columns), (c.name for c in metrics))
    return tuple(dict.fromkeys([PAPER, *keys] if paper else keys))


def _rows(
    spec: TableSpec, columns: Sequence[Column], compared: ComparedRows, gaps: Sequence[Gap]
) -> list[Row]:
    """The rows with everything but the paper's figures."""
    results = compared.results
    metrics = row_metrics(results)
    rows = []
    for row in spec.rows:
        line = table_row(row, columns, results.get(row.key), missing_reason(row.key, gaps))
        marks = _marks(spec, row, compared)
        scores = {
            name: score.model_copy(update={"mark": marks.get(name)})
            for name, score in line.scores.items()
        }
        changes = {
            "scores": scores,
            "metrics": metrics.get(row.key, {}),
            "reward_hacking": compared.hacking(row.key, spec.baseline, line.about)
            if any(metrics.values())
            else None,
            "costs": {name: line.every_cost[name] for name in spec.costs if line.every_cost},
        }
        rows.append(line.model_copy(update=changes))
    return [row for _, members in grouped(rows) for row in mark_best(members)]


def reference_of(spec: TableSpec, row: RowSpec) -> RowSpec | None:
    """What a row is held against: the table's baseline, else the first focus row of its group."""
    rows = {one.key: one for one in spec.rows}
    focus = [rows[key] for key in spec.focus if rows[key].group == row.group]
    found = rows[spec.baseline] if spec.baseline is not None else next(iter(focus), None)
    return None if found is None or found.key == row.key else found


def _marks(spec: TableSpec, row: RowSpec, compared: ComparedRows) -> dict[str, Mark]:
    """Every score of a row against the reference's; none where the two were evaluated otherwise."""
    reference, results = reference_of(spec, row), compared.results
    if reference is None or row.key not in results or reference.key not in results:
        return {}
    if not alike(results[row.key], results[reference.key]):
        return {}
    found = compared(row.key, reference.key)
    adjusted = corrected(found)
    return {
        name: Mark(
            reference=full_label(reference),
            difference=one.difference,
            low=one.low,
            high=one.high,
            about=one.label,
            p_value=one.p_value,
            p_holm=adjusted[name],
        )
        for name, one in found.items()
    }


# Comparisons


def _pairs(spec: TableSpec) -> Iterator[tuple[Question, RowSpec, RowSpec]]:
    """Every pair to be compared, each once.

    The rows named by the table's ``focus`` are compared with every other row of their group and, as
    a second question, with its ``baseline``.
    """
    rows = {row.key: row for row in spec.rows}
    seen: set[frozenset[str]] = set()
    for focus in (rows[key] for key in spec.focus):
        members = [row for row in spec.rows if row.group == focus.group]
        others: list[tuple[Question, RowSpec]] = [
            ("rows", row) for row in members if row.key != spec.baseline
        ]
        if spec.baseline is not None:
            others.append(("baseline", rows[spec.baseline]))
        for question, other in others:
            pair = frozenset((focus.key, other.key))
            if len(pair) == 2 and pair not in seen:
                seen.add(pair)
                yield question, focus, other


def _comparisons(
    spec: TableSpec,
    compared: ComparedRows,
    rows: Sequence[Row],
    columns: Mapping[str, Column],
    paper: PaperTables,
) -> list[RowComparison]:
    """Every comparison that the table's ``focus`` and ``baseline`` ask for and the cells allow.

    Where three seeds are shared a comparison is about the methods (paired t-test on seed means);
    elsewhere it is about the trained weights at hand (paired over prompts) and says so. Within each
    group and question the p-values are corrected together, over rows and score columns.
    """
    pairs = [p for p in _pairs(spec) if {p[1].key, p[2].key} <= compared.results.keys()]
    families: dict[tuple[str, Question], dict[tuple[str, str, str], Comparison]] = {}
    for question, focus, other in pairs:
        family = families.setdefault((focus.group, question), {})
        for name, one in compared(focus.key, other.key).items():
            family[focus.key, other.key, name] = one
    adjusted = {key: p for family in families.values() for key, p in corrected(family).items()}
    lines = {row.key: row for row in rows}
    found = []
    for question, focus, other in pairs:
        first, second = (compared.results[row.key] for row in (focus, other))
        improved = improvements(first, second, compared.rewards)
        ratios = cost_ratios(lines[focus.key], lines[other.key])
        for name, one in compared(focus.key, other.key).items():
            p_holm = adjusted[focus.key, other.key, name]
            found.append(
                RowComparison(
                    first=focus.key,
                    second=other.key,
                    reward=name,
                    question=question,
                    difference=one.difference,
                    low=one.low,
                    high=one.high,
                    p_value=one.p_value,
                    p_holm=p_holm,
                    family=len(families[focus.group, question]),
                    about=one.label,
                    count=one.count,
                    level=one.level,
                    improvement=Number(**interval_fields(improved[name])),
                    verdict=_verdict(one, p_holm),
                    published_difference=_published(spec, paper, (focus, other), columns[name]),
                    cost_ratios=ratios,
                )
            )
    return found


def _verdict(found: Comparison, p_holm: float) -> str:
    """One of :data:`VERDICTS`."""
    if not found.p_value < ALPHA:
        return UNCLEAR
    direction = "above" if found.difference > 0 else "below"
    return direction if p_holm < ALPHA else f"{direction} before correction only"


def _published(
    spec: TableSpec, paper: PaperTables, pair: tuple[RowSpec, RowSpec], column: Column
) -> float | None:
    """The paper's difference; None where it has none."""
    table, (first, second) = spec.paper_table, pair
    if table is None or first.paper is None or second.paper is None or column.paper is None:
        return None
    ours, theirs = paper.row(table, first.paper), paper.row(table, second.paper)
    return round(ours.scores[column.paper] - theirs.scores[column.paper], DIGITS)
