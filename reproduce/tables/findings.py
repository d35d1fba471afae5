"""Paired comparisons between the rows of a table.

The rows named by the table's ``focus`` are compared with every other row of their group and, as
a second question, with its ``baseline``. Where three seeds are shared the comparison is about the
methods (paired t-test on seed means); elsewhere it is about the trained weights at hand (paired
over prompts) and says so. Within each group and question the p-values are corrected together, over
rows and score columns, by Holm's procedure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.evaluation.results import Cell
from benchmarks.evaluation.statistics import (
    ALPHA,
    Comparison,
    CorrectedComparison,
    Interval,
    comparison_sentence,
    holm,
    improvement_sentence,
)
from reproduce.tables.comparisons import compare_rows, improvements, strongest_label
from reproduce.tables.paper import DIGITS, PaperTables, load_paper_tables
from reproduce.tables.spec import ColumnSpec, RowSpec, TableSpec
from reproduce.tables.values import select_rows

UNCLEAR = "not settled"
VERDICTS = (
    "above",
    "below",
    "above before correction only",
    "below before correction only",
    UNCLEAR,
)

Question = Literal["rows", "baseline"]
PaperVerdict = Literal["confirmed", "same direction", "opposite direction", "contradicted"]


@dataclass(frozen=True)
class Finding:
    """One compared pair in one score column.

    Attributes:
        group: the label of the focus row's group.
        question: against another row of the group, or against the baseline.
        focus: the row that is looked at.
        other: the row it is compared with.
        column: the score.
        comparison: focus minus other.
        improvement: how likely focus scores higher than other on a prompt.
        adjusted: Holm-corrected p-value.
        family: comparisons that were corrected together.
        published: the paper's difference, as far as its printed decimals tell; None without one.
    """

    group: str
    question: Question
    focus: RowSpec
    other: RowSpec
    column: ColumnSpec
    comparison: Comparison
    improvement: Interval
    adjusted: float = 1.0
    family: int = 1
    published: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.adjusted < ALPHA

    @property
    def verdict(self) -> str:
        """One of :data:`VERDICTS`."""
        if not self.comparison.p_value < ALPHA:
            return UNCLEAR
        direction = "above" if self.comparison.difference > 0 else "below"
        return direction if self.significant else f"{direction} before correction only"

    @property
    def sentences(self) -> str:
        """The difference, and how often it shows on a prompt, in two plain sentences."""
        found = CorrectedComparison(
            first=self.focus.label,
            second=self.other.label,
            reward=self.column.label,
            comparison=self.comparison,
            adjusted=self.adjusted,
            family=self.family,
            improvement=self.improvement,
        )
        difference = comparison_sentence(found, digits=self.column.digits)
        return f"{difference} {improvement_sentence(found)}"

    @property
    def paper_verdict(self) -> PaperVerdict | None:
        """How the direction relates to the paper's; None where the paper has none."""
        if not self.published or self.comparison.difference == 0:
            return None
        same = (self.published > 0) == (self.comparison.difference > 0)
        if self.significant:
            return "confirmed" if same else "contradicted"
        return "same direction" if same else "opposite direction"


def findings(
    spec: TableSpec, cells: Sequence[Cell], *, profile: str, paper: PaperTables | None = None
) -> tuple[Finding, ...]:
    """Every comparison that the table's ``focus`` and ``baseline`` ask for and the cells allow.

    Args:
        spec: the table; a pair of which one row is missing is left out.
        cells: its finished cells.
        profile: the profile the cells were measured under.
        paper: the paper's figures; None loads the project's own copy.

    Raises:
        UserError: the cells do not fit the table or each other.
    """
    results = select_rows(spec, cells)
    published = load_paper_tables() if paper is None else paper
    found: list[Finding] = []
    for question, focus, other in _pairs(spec):
        if focus.key not in results or other.key not in results:
            continue
        pair = (results[focus.key], results[other.key])
        columns = [
            column
            for column in spec.columns_for(profile)
            if all(column.reward in row.rewards for row in pair)
        ]
        rewards, label = [column.reward for column in columns], strongest_label(*pair)
        compared = compare_rows(*pair, rewards, label)
        improved = improvements(*pair, rewards, label)
        for column, comparison, improvement in zip(columns, compared, improved, strict=True):
            theirs = _published(spec, published, focus, other, column)
            finding = Finding(focus.group, question, focus, other, column, comparison, improvement)
            found.append(replace(finding, published=theirs))
    return _corrected(found)


def _pairs(spec: TableSpec) -> Iterator[tuple[Question, RowSpec, RowSpec]]:
    """Every pair to be compared, each once."""
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


def _published(
    spec: TableSpec, paper: PaperTables, focus: RowSpec, other: RowSpec, column: ColumnSpec
) -> float | None:
    table = spec.paper_table
    if table is None or focus.paper is None or other.paper is None or column.paper is None:
        return None
    first, second = (
        paper.row(table, key).scores[column.paper] for key in (focus.paper, other.paper)
    )
    return round(first - second, DIGITS)


def _corrected(found: Sequence[Finding]) -> tuple[Finding, ...]:
    families: dict[tuple[str, Question], list[int]] = {}
    for index, finding in enumerate(found):
        families.setdefault((finding.group, finding.question), []).append(index)
    corrected = list(found)
    for members in families.values():
        adjusted = holm([found[index].comparison.p_value for index in members])
        for index, value in zip(members, adjusted, strict=True):
            corrected[index] = replace(found[index], adjusted=float(value), family=len(members))
    return tuple(corrected)
