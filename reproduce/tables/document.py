"""A table for programs: every number of it, with what it was made from, as one JSON document.

The committed schema (``table.schema.json``) is the one of :class:`TableDocument`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks.evaluation.results import Cell, Cost, Protocol, RowScores
from benchmarks.evaluation.statistics import ALPHA, Interval, Label
from g2rpo.config import StrictModel, content_hash
from reproduce.tables.findings import Finding, Question, findings
from reproduce.tables.formats import legend
from reproduce.tables.references import MEASURES, PAPER, REWARDS, cited
from reproduce.tables.spec import COST_LABELS, METRIC_LABELS, RowSpec
from reproduce.tables.values import Group, Row, Table, Value, select_rows

SCHEMA = Path(__file__).parent / "table.schema.json"
DIGITS = 7
"""Figures of each number, as in the CSV: what lies beyond depends on the machine."""


class Number(StrictModel):
    """A mean with its interval, as :class:`benchmarks.evaluation.statistics.Interval` has them."""

    mean: float
    low: float | None = None
    high: float | None = None
    about: Label | None = None
    """``checkpoint`` or ``method``; absent for a published figure."""
    count: int | None = None
    """Prompts (checkpoint) or seeds (method) behind the interval."""
    level: float | None = None


class Score(Number):
    """A number in a score column."""

    in_domain: bool
    best: bool


class RewardHacking(StrictModel):
    """What rose and what fell, with significance, against the baseline."""

    flagged: bool
    rose: tuple[str, ...]
    fell: tuple[str, ...]


class Origin(StrictModel):
    """What cells were made with: what their provenance says, less what is null."""

    git_commit: str | None = None
    git_dirty: bool | None = None
    packages: dict[str, str]
    weights: dict[str, str]
    hardware: dict[str, str]
    checkpoint: str | None = None


class Source(StrictModel):
    """One cell behind a row."""

    seed: int | None = None
    runs: dict[str, str]
    """Names end in a hash of the configuration and of all inputs."""
    iteration: int | None = None
    protocol: str
    """The hash of one of the document's protocols."""
    origin: str
    """The key of one of the document's origins."""
    cost: Cost | None = None


class DocumentRow(StrictModel):
    """One row."""

    key: str
    label: str
    group: str
    trained_on: tuple[str, ...]
    method: str | None = None
    preset: str | None = None
    seeds: tuple[int, ...] = ()
    missing: str | None = None
    """Why it has no result."""
    scores: dict[str, Score]
    metrics: dict[str, Number] = Field(default_factory=dict)
    reward_hacking: RewardHacking | None = None
    costs: dict[str, float]
    """Means over the seeds."""
    sources: tuple[Source, ...] = ()


class DocumentComparison(StrictModel):
    """One row against another in one score: first minus second."""

    first: str
    second: str
    reward: str
    question: Question
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float
    family: int
    """Comparisons that were corrected together."""
    about: Label
    count: int
    level: float
    improvement: Number
    """Probability that the first scores higher on a prompt."""
    verdict: str
    published_difference: float | None = None


class Column(StrictModel):
    """A score column, a measure or a cost."""

    name: str
    label: str
    cite: tuple[str, ...] = ()


class PublishedRow(StrictModel):
    """Figures of the paper."""

    label: str
    group: str
    scores: dict[str, float]


class TableDocument(StrictModel):
    """A whole table."""

    format: Literal["g2rpo table"] = "g2rpo table"
    version: Literal[1] = 1
    name: str
    title: str
    profile: str
    columns: tuple[Column, ...]
    metrics: tuple[Column, ...] = ()
    costs: tuple[Column, ...] = ()
    rows: tuple[DocumentRow, ...]
    comparisons: tuple[DocumentComparison, ...] = ()
    published: tuple[PublishedRow, ...] = ()
    published_source: str | None = None
    protocols: tuple[Protocol, ...] = ()
    """Under which held-out prompts were sampled."""
    origins: dict[str, Origin] = Field(default_factory=dict)
    notes: tuple[str, ...]
    references: tuple[str, ...]
    """Keys into the BibTeX file beside this one."""


def schema() -> dict[str, Any]:
    """The JSON Schema of :class:`TableDocument`."""
    found = TableDocument.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | found


def to_json(table: Table, cells: Sequence[Cell]) -> str:
    """A computed table, its comparisons and its sources as JSON.

    Args:
        table: the table.
        cells: the cells that it was computed from.
    """
    document = table_document(table, cells)
    data = _rounded(document.model_dump(mode="json", exclude_none=True))
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def table_document(table: Table, cells: Sequence[Cell]) -> TableDocument:
    """What :func:`to_json` writes."""
    spec = table.spec
    results = select_rows(spec, cells)
    by_key = {row.key: row for row in spec.rows}
    used = [cell for result in results.values() for cell in result.cells]
    ours = [(group.label, row) for group in table.groups for row in group.rows]
    return TableDocument(
        name=spec.name,
        title=spec.title,
        profile=table.profile,
        columns=tuple(
            Column(name=c.reward, label=c.label, cite=REWARDS.get(c.reward, ()))
            for c in table.columns
        ),
        metrics=tuple(
            Column(name=name, label=METRIC_LABELS[name], cite=MEASURES.get(name, ()))
            for name in table.metrics
        ),
        costs=tuple(Column(name=name, label=COST_LABELS[name]) for name in spec.costs),
        rows=tuple(
            _row(label, row, by_key[row.key], table, results.get(row.key))
            for label, row in ours
            if not row.from_paper
        ),
        comparisons=tuple(
            _comparison(found) for found in findings(spec, cells, profile=table.profile)
        ),
        published=_published(table),
        published_source=None if table.paper is None else table.paper.caption,
        protocols=tuple({cell.info.protocol.hash: cell.info.protocol for cell in used}.values()),
        origins={_origin_key(origin): origin for origin in map(_origin, used)},
        notes=(*legend(table), *table.notes),
        references=tuple(references_of(table, cells)),
    )


def references_of(table: Table, cells: Sequence[Cell]) -> list[str]:
    """The keys of all that a table shows."""
    results = select_rows(table.spec, cells)
    methods = dict.fromkeys(row.cells[0].info.method for row in results.values())
    keys = cited(methods, (column.reward for column in table.columns), table.metrics)
    shows_paper = table.paper is not None or any(
        row.from_paper for group in table.groups for row in group.rows
    )
    return list(dict.fromkeys([PAPER, *keys])) if shows_paper else keys


def _number(interval: Interval) -> Number:
    return Number(
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        about=interval.label,
        count=interval.count,
        level=interval.level,
    )


def _score(value: Value) -> Score:
    marks = {"in_domain": value.in_domain, "best": value.best}
    if value.interval is None:
        assert value.mean is not None
        return Score(mean=value.mean, **marks)
    return Score(**_number(value.interval).model_dump(), **marks)


def _row(
    group: str, row: Row, spec: RowSpec, table: Table, result: RowScores | None
) -> DocumentRow:
    rewards = [column.reward for column in table.columns]
    info = None if result is None else result.cells[0].info
    costs = zip(table.spec.costs, row.costs, strict=True)
    hacking = row.hacking
    return DocumentRow(
        key=row.key,
        label=row.label,
        group=group,
        trained_on=spec.train,
        method=None if info is None else info.method,
        preset=None if info is None else info.preset,
        seeds=() if result is None else result.seeds,
        missing=row.gap,
        scores={
            name: _score(value)
            for name, value in zip(rewards, row.values, strict=True)
            if value.mean is not None
        },
        metrics={
            name: _number(value.interval)
            for name, value in zip(table.metrics, row.metrics, strict=False)
            if value.interval is not None
        },
        reward_hacking=None
        if hacking is None
        else RewardHacking(flagged=hacking.flagged, rose=hacking.rose, fell=hacking.fell),
        costs={str(name): cost for name, cost in costs if cost is not None},
        sources=() if result is None else tuple(_source(cell) for cell in result.cells),
    )


def _source(cell: Cell) -> Source:
    info = cell.info
    return Source(
        seed=info.seed,
        runs=info.runs,
        iteration=info.checkpoint_iteration,
        protocol=info.protocol.hash,
        origin=_origin_key(_origin(cell)),
        cost=info.cost,
    )


def _origin(cell: Cell) -> Origin:
    return Origin.model_validate(cell.info.provenance.model_dump())


def _origin_key(origin: Origin) -> str:
    return content_hash(origin.model_dump(mode="json"))


def _comparison(found: Finding) -> DocumentComparison:
    c = found.comparison
    return DocumentComparison(
        first=found.focus.key,
        second=found.other.key,
        reward=found.column.reward,
        question=found.question,
        difference=c.difference,
        low=c.low,
        high=c.high,
        p_value=c.p_value,
        p_holm=found.adjusted,
        family=found.family,
        about=c.label,
        count=c.count,
        level=c.level,
        improvement=_number(found.improvement),
        verdict=found.verdict,
        published_difference=found.published,
    )


def _published(table: Table) -> tuple[PublishedRow, ...]:
    """The paper's rows, beside ours or in their own block."""
    groups: Sequence[Group] = table.groups
    names = [str(column.reward) for column in table.columns]
    if table.paper is not None:
        groups, names = table.paper.groups, list(table.paper.columns)
    return tuple(
        PublishedRow(label=row.label, group=group.label, scores=_published_scores(names, row))
        for group in groups
        for row in group.rows
        if row.from_paper
    )


def _published_scores(names: Sequence[str], row: Row) -> dict[str, float]:
    pairs = zip(names, row.values, strict=True)
    return {name: value.published for name, value in pairs if value.published is not None}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        rounded = float(f"{value:.{DIGITS}g}")
        # A p-value stays on its side of what counts as significant.
        return value if (value < ALPHA) != (rounded < ALPHA) else rounded
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(schema(), indent=2) + "\n")
