"""The report's tables: plain cells with what they are sorted by, whatever they show."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.evaluation.results import Cell
from benchmarks.evaluation.statistics import NOTHING, human, p_text, signed
from reproduce.report.marks import Mark
from reproduce.tables.findings import Finding
from reproduce.tables.old_formats import (
    IN_DOMAIN,
    hacking_text,
    interval_text,
    metric_labels,
    metric_values,
)
from reproduce.tables.spec import COST_LABELS, ColumnSpec, TableSpec
from reproduce.tables.values import Group, Row, Table, Value, row_costs, select_rows

PHASES = {
    "sampling": "Sampling",
    "scoring": "Decoding and rewards",
    "training": "Forwards, backwards, update",
}
"""The phases of an iteration that a run's metrics tell, in order."""
PHASE_PREFIX = "seconds/"
COST_PARTS = ("Rollout evaluations", "3 × backwards")
"""What the measure of equal cost adds up."""


@dataclass(frozen=True)
class Box:
    """One cell of a table.

    Attributes:
        text: what is read.
        sort: what it is sorted by; None comes last in either direction.
        interval: a second line.
        notes: signs after the text, each with what it means.
        strong: the best of its group.
        kind: how it is set: ``number``, ``label``, ``gap``, ``warning`` or ``text``.
        link: the anchor that the text leads to.
        details: names and values, folded away.
        shares: parts of a bar, each with its name and its share of the longest bar.
    """

    text: str
    sort: float | str | None = None
    interval: str | None = None
    notes: tuple[tuple[str, str], ...] = ()
    strong: bool = False
    kind: str = "text"
    link: str | None = None
    details: tuple[tuple[str, str], ...] = ()
    shares: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Heading:
    """The head of a column."""

    label: str
    numeric: bool = False
    about: str = ""


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        caption: what it shows, in a few words.
        columns: the heads.
        rows: as many boxes as there are columns, each.
        anchors: an id for each row, or none.
        notes: sentences below.
        begins: the rows that begin a group, where no other order is chosen.
    """

    caption: str
    columns: tuple[Heading, ...]
    rows: tuple[tuple[Box, ...], ...]
    anchors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    begins: frozenset[int] = frozenset()

    @property
    def slotted(self) -> frozenset[int]:
        """The columns of figures of which any has signs after it."""
        boxes = ((i, box) for row in self.rows for i, box in enumerate(row))
        return frozenset(i for i, box in boxes if box.notes and box.kind == "number")


def anchor(*parts: str) -> str:
    """An id for a part of the page, the same each time."""
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)


def number(value: float | None, text: str, **more: object) -> Box:
    """A figure that is sorted by its value."""
    return replace(Box(text, value, kind="number"), **more)  # type: ignore[arg-type]


def text_box(text: str, kind: str = "text") -> Box:
    """Words that are sorted as such."""
    return Box(text, text.lower(), kind=kind)


def has_groups(groups: Sequence[Group]) -> bool:
    """Whether the groups of a table have names."""
    return any(group.label for group in groups)


def first_heads(spec: TableSpec, *, grouped: bool) -> list[Heading]:
    """The columns that say which row it is."""
    heads = [Heading(spec.row_label)]
    return [*heads, Heading(spec.group_label)] if grouped else heads


def _first_boxes(chapter: str, group: str, row: Row, *, grouped: bool) -> list[Box]:
    link = None if row.from_paper or row.gap is not None else anchor("run", chapter, row.key)
    boxes = [Box(row.label, row.label.lower(), kind="label", link=link)]
    return [*boxes, text_box(group or NOTHING)] if grouped else boxes


def _grid(
    caption: str,
    heads: Sequence[Heading],
    lines: Sequence[tuple[Box, ...]],
    notes: Sequence[str] = (),
    *,
    grouped: bool,
) -> Grid:
    """A table whose second column, where ``grouped``, names the group."""
    names = [line[1].text for line in lines] if grouped else []
    begins = frozenset(i for i in range(1, len(names)) if names[i] != names[i - 1])
    return Grid(caption, tuple(heads), tuple(lines), notes=tuple(notes), begins=begins)


def score_box(value: Value, mark: Mark | None = None) -> Box:
    """A score with its interval and signs."""
    if value.shown is None:
        return number(None, NOTHING)
    notes = [(IN_DOMAIN, "in-domain: trained on this reward")] if value.in_domain else []
    if mark is not None and mark.symbol:
        notes.append((mark.symbol, mark.sentence))
    interval = interval_text(value)
    return number(value.mean, value.shown, interval=interval, strong=value.best, notes=tuple(notes))


def score_grid(
    chapter: str, table: Table, marks: Mapping[tuple[str, str], Mark], notes: Sequence[str]
) -> Grid:
    """The table itself: scores with intervals and marks; what is missing says why."""
    grouped = has_groups(table.groups)
    heads = first_heads(table.spec, grouped=grouped)
    heads += [Heading(column.label, numeric=True) for column in table.columns]
    heads += [Heading("Seeds", numeric=True), Heading("Interval")]
    lines = []
    for group in table.groups:
        for row in group.rows:
            boxes = _first_boxes(chapter, group.label, row, grouped=grouped)
            pairs = zip(table.columns, row.values, strict=True)
            boxes += [score_box(v, marks.get((row.key, c.reward))) for c, v in pairs]
            seeds = number(row.seeds, str(row.seeds) if row.seeds else NOTHING)
            label = Box(f"missing: {row.gap}", None, kind="gap")
            if row.gap is None:
                label = text_box(row.interval_label or NOTHING)
            lines.append((*boxes, seeds, label))
    return _grid(table.spec.title, heads, lines, notes, grouped=grouped)


def beside_grid(chapter: str, table: Table, notes: Sequence[str]) -> Grid | None:
    """Diversity, drift and the flag for reward hacking; None where nothing was measured."""
    if not table.metrics:
        return None
    grouped = has_groups(table.groups)
    heads = first_heads(table.spec, grouped=grouped)
    *metrics, hacking = metric_labels(table)
    heads += [*(Heading(label, numeric=True) for label in metrics), Heading(hacking)]
    lines = []
    for group in table.groups:
        for row in (row for row in group.rows if not row.from_paper):
            boxes = _first_boxes(chapter, group.label, row, grouped=grouped)
            boxes += [score_box(value) for value in metric_values(table, row)]
            said = hacking_text(table, row)
            flagged = row.hacking is not None and row.hacking.flagged
            flag = Box(said, said, kind="warning" if flagged else "text")
            if row.gap is not None:
                flag = Box(f"missing: {row.gap}", None, kind="gap")
            lines.append((*boxes, flag))
    caption = "Diversity, drift and reward hacking"
    return _grid(caption, heads, lines, notes, grouped=grouped)


def paper_grid(table: Table) -> Grid | None:
    """The paper's own figures where they may not stand next to ours."""
    if table.paper is None:
        return None
    grouped = has_groups(table.paper.groups)
    heads = first_heads(table.spec, grouped=grouped)
    heads += [Heading(column, numeric=True) for column in table.paper.columns]
    lines = [
        (
            *_first_boxes("", group.label, row, grouped=grouped),
            *(score_box(value) for value in row.values),
        )
        for group in table.paper.groups
        for row in group.rows
    ]
    return _grid(table.paper.caption, heads, lines, grouped=grouped)


def cost_grid(chapter: str, table: Table, cells: Sequence[Cell]) -> Grid:
    """What one training run took, mean over seeds, in every measure."""
    results = select_rows(table.spec, cells)
    grouped = has_groups(table.groups)
    heads = first_heads(table.spec, grouped=grouped)
    heads += [Heading(label, numeric=True) for label in COST_LABELS.values()]
    heads += [Heading("Shares")]
    every = (row_costs(found, ("equal_cost_evaluations",))[0] for found in results.values())
    longest = max((cost for cost in every if cost), default=1.0)
    lines = []
    for group in table.groups:
        for row in (row for row in group.rows if not row.from_paper):
            boxes = _first_boxes(chapter, group.label, row, grouped=grouped)
            found = results.get(row.key)
            names = tuple(COST_LABELS)
            costs = (None,) * len(names) if found is None else row_costs(found, names)
            figures = [number(cost, human(cost)) for cost in costs]
            lines.append((*boxes, *figures, _cost_bar(costs, longest)))
    devices = sorted({c.info.cost.device for c in cells if c.info.cost and c.info.cost.iterations})
    notes = ["One training run up to the evaluated checkpoint, mean over seeds."]
    if devices:
        compare = "" if len(devices) == 1 else "; seconds on different devices do not compare"
        notes.append(f"Trained on {', '.join(devices)}{compare}.")
    return _grid("Cost of training", heads, lines, notes, grouped=grouped)


def _cost_bar(costs: Sequence[float | None], longest: float) -> Box:
    """Rollout evaluations and backwards in one measure, of the dearest row's."""
    known = dict(zip(COST_LABELS, costs, strict=True))
    total, rollout = known["equal_cost_evaluations"], known["rollout_evaluations"]
    if not total or rollout is None:
        return Box(NOTHING)
    parts = zip(COST_PARTS, (rollout, total - rollout), strict=True)
    return Box("", total, shares=tuple((name, part / longest) for name, part in parts))


def phase_seconds(cell: Cell) -> dict[str, float] | None:
    """Seconds of each phase over all iterations, and of the rest; None where not recorded."""
    curve = cell.curve
    if curve is None or any(PHASE_PREFIX + phase not in curve for phase in PHASES):
        return None
    trained = curve[curve["iteration"] > 0]
    if trained.empty or trained[[PHASE_PREFIX + phase for phase in PHASES]].isna().any(axis=None):
        return None
    seconds = {phase: float(trained[PHASE_PREFIX + phase].sum()) for phase in PHASES}
    total = float(trained["seconds"].iloc[-1])
    return seconds | {"rest": max(0.0, total - sum(seconds.values()))}


def phase_grid(chapter: str, table: Table, cells: Sequence[Cell]) -> Grid | None:
    """Seconds by phase, mean over seeds, as figures and as a bar; None where no run has them."""
    results = select_rows(table.spec, cells)
    measured: dict[str, dict[str, float]] = {}
    for key, found in results.items():
        parts = [phase_seconds(cell) for cell in found.cells]
        known = [part for part in parts if part is not None]
        if known and len(known) == len(parts):
            measured[key] = {p: float(np.mean([k[p] for k in known])) for p in known[0]}
    if not measured:
        return None
    names = PHASES | {"rest": "Rest"}
    longest = max(sum(seconds.values()) for seconds in measured.values()) or 1.0
    grouped = has_groups(table.groups)
    heads = first_heads(table.spec, grouped=grouped)
    heads += [*(Heading(label, numeric=True) for label in names.values()), Heading("Shares")]
    lines = []
    for group in table.groups:
        for row in (r for r in group.rows if r.key in measured):
            seconds = measured[row.key]
            bar = tuple((names[p], s / longest) for p, s in seconds.items())
            total = sum(seconds.values())
            lines.append(
                (
                    *_first_boxes(chapter, group.label, row, grouped=grouped),
                    *(number(seconds[phase], human(seconds[phase])) for phase in names),
                    Box("", total, shares=bar),
                )
            )
    note = (
        "Seconds of the training iterations by phase, mean over seeds and ranks; validation, "
        "checkpoints and loading are outside of them. Rows of runs that did not record it are left "
        "out."
    )
    return _grid("Seconds by phase", heads, lines, (note,), grouped=grouped)


def _p_box(value: float) -> Box:
    return number(value, p_text(value))


def finding_grid(spec: TableSpec, found: Sequence[Finding]) -> Grid | None:
    """Every comparison that the table asks for; None where there is none."""
    if not found:
        return None
    grouped = any(f.group for f in found)
    labels = ("Row", *((spec.group_label,) if grouped else ()), "Against", "Score")
    heads = [Heading(label) for label in labels]
    heads += [Heading(label, numeric=True) for label in ("Difference", "p", "p (Holm)")]
    heads += [Heading("About"), Heading("Verdict")]
    with_paper = any(f.published is not None for f in found)
    heads += [Heading("Paper's difference", numeric=True)] if with_paper else []
    lines = []
    for f in found:
        boxes = [text_box(f.focus.label, "label")]
        boxes += [text_box(f.group or NOTHING)] if grouped else []
        boxes += [text_box(f.other.label), _score_name(f.column, f.focus.train)]
        boxes += [_difference_box(f), _p_box(f.comparison.p_value), _p_box(f.adjusted)]
        boxes += [text_box(f.comparison.label), Box(f.verdict, f.verdict, strong=f.significant)]
        if with_paper:
            shown = NOTHING if f.published is None else signed(f.published, 3)
            boxes.append(number(f.published, shown))
        lines.append(tuple(boxes))
    return _grid("Comparisons", heads, lines, grouped=grouped)


def _score_name(column: ColumnSpec, trained: Sequence[str]) -> Box:
    notes = ((IN_DOMAIN, "in-domain"),) if column.reward in trained else ()
    return Box(column.label, column.label.lower(), notes=notes)


def _difference_box(f: Finding) -> Box:
    c, digits = f.comparison, f.column.digits
    interval = f"[{signed(c.low, digits)}, {signed(c.high, digits)}]"
    return number(c.difference, signed(c.difference, digits), interval=interval)
