"""A computed table as one immutable object; every format is a pure function of it.

What programs read, ``<name>.json``, is this model's own dump. Fields that only presentation needs
(:func:`hidden`) are no part of it.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from pydantic import Field, field_serializer

from benchmarks.evaluation.results import Cost, Protocol, Provenance
from benchmarks.evaluation.statistics import ALPHA, NOTHING, Interval, Label, fixed
from g2rpo.config import StrictModel
from reproduce.experiment.table import CostColumn, PaperColumn

IN_DOMAIN = "†"
HACKING_LABEL = "Reward hacking"
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


def hidden(default: Any) -> Any:
    """A field that is left out of the JSON document."""
    return Field(default, exclude=True)


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
    digits: int = hidden(3)
    """Decimals shown."""

    @property
    def text(self) -> str:
        """The mean as printed."""
        return fixed(self.mean, self.digits)

    @property
    def ends(self) -> str | None:
        """``[low, high]`` as printed, or None where there is no interval."""
        if self.low is None or self.high is None:
            return None
        return f"[{fixed(self.low, self.digits)}, {fixed(self.high, self.digits)}]"


def interval_fields(interval: Interval) -> dict[str, Any]:
    """The fields of a :class:`Number` of an interval."""
    return {
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "about": interval.label,
        "count": interval.count,
        "level": interval.level,
    }


class Mark(StrictModel):
    """How a score stands to that of the row's reference: the row minus the reference.

    The p-values of one row are corrected together over its scores by Holm's procedure.
    """

    reference: str
    """The reference as it is named outside the table."""
    difference: float
    low: float
    high: float
    about: Label
    p_value: float
    p_holm: float

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.p_holm < ALPHA


class Score(Number):
    """A number in a score column."""

    in_domain: bool
    """The row was trained on this column's reward."""
    best: bool
    """No row of its group shows a higher figure, and at least one other shows any."""
    mark: Mark | None = hidden(None)


class RewardHacking(StrictModel):
    """Whether a row looks like reward hacking: what it trains on rose while something else fell."""

    flagged: bool
    rose: tuple[str, ...]
    """In-domain rewards significantly above the baseline."""
    fell: tuple[str, ...]
    """Out-of-domain rewards and measures of diversity significantly below it."""


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


class Row(StrictModel):
    """One line of a table: a row of ours, or (without a key) the paper's figures for one."""

    key: str
    label: str
    group: str
    trained_on: tuple[str, ...] = ()
    method: str | None = None
    preset: str | None = None
    seeds: tuple[int, ...] = ()
    missing: str | None = None
    """Why it has no result."""
    scores: dict[str, Score]
    """By column; what was not scored is absent."""
    metrics: dict[str, Number] = Field(default_factory=dict)
    reward_hacking: RewardHacking | None = None
    """None where it cannot be told."""
    costs: dict[str, float] = Field(default_factory=dict)
    """Means over the seeds."""
    sources: tuple[Source, ...] = ()
    full_label: str = hidden("")
    """The label with the group, as the row is named outside the table."""
    every_cost: dict[CostColumn, float] = hidden({})
    """All measures of cost, those that the table does not show as well."""
    published: "Row | None" = hidden(None)
    """The paper's figures, where they stand below the row."""

    @property
    def from_paper(self) -> bool:
        """Whether the figures are the paper's."""
        return not self.key

    @property
    def about(self) -> Label | None:
        """What its intervals are about; None where it has none."""
        return next((s.about for s in self.scores.values() if s.about is not None), None)


class RowComparison(StrictModel):
    """One row against another in one score: first minus second."""

    first: str
    second: str
    reward: str
    question: Question
    """Against another row of the group, or against the baseline."""
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
    """One of :data:`VERDICTS`."""
    published_difference: float | None = None
    """The paper's, as far as its printed decimals tell."""
    cost_ratios: dict[CostColumn, float] = hidden({})
    """What training the first cost in units of the second, by measure."""

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.p_holm < ALPHA

    @property
    def paper_verdict(self) -> PaperVerdict | None:
        """How the direction relates to the paper's; None where the paper has none."""
        if not self.published_difference or self.difference == 0:
            return None
        same = (self.published_difference > 0) == (self.difference > 0)
        if self.significant:
            return "confirmed" if same else "contradicted"
        return "same direction" if same else "opposite direction"


class Column(StrictModel):
    """A score column, a measure or a cost."""

    name: str
    label: str
    cite: tuple[str, ...] = ()
    digits: int = hidden(3)
    paper: PaperColumn | None = hidden(None)
    """The paper's column for the same reward, or the one whose role it takes."""


class PublishedRow(StrictModel):
    """Figures of the paper, as they stand in the document."""

    label: str
    group: str
    scores: dict[str, float]


class Table(StrictModel):
    """A whole table."""

    format: Literal["g2rpo table"] = "g2rpo table"
    version: Literal[1] = 1
    name: str
    title: str
    profile: str
    columns: tuple[Column, ...]
    metrics: tuple[Column, ...] = ()
    """The measures beside the rewards that any row has."""
    costs: tuple[Column, ...] = ()
    rows: tuple[Row, ...]
    comparisons: tuple[RowComparison, ...] = ()
    published: tuple[Row, ...] = ()
    """The paper's rows: below ours, or where they do not compare in a block of their own."""
    published_source: str | None = None
    """The caption of the paper's block; None where there is none."""
    protocols: tuple[Protocol, ...] = ()
    """Under which held-out prompts were sampled."""
    origins: dict[str, Provenance] = Field(default_factory=dict)
    notes: tuple[str, ...]
    """Sentences below the table; the document has the legends before them."""
    references: tuple[str, ...] = ()
    """Keys into the BibTeX file beside this one."""
    group_label: str = hidden("")
    row_label: str = hidden("")
    legend: tuple[str, ...] = hidden(())
    """What the marks and intervals mean; only those that occur."""
    metric_legend: tuple[str, ...] = hidden(())
    published_columns: tuple[Column, ...] = hidden(())
    same_model: bool = hidden(False)
    """Whether the profile trains the paper's own model."""
    styles: "Table | None" = hidden(None)
    """The scores by the style of the prompts, where their set has several."""

    @field_serializer("published")
    def _published_figures(self, rows: Sequence[Row]) -> tuple[PublishedRow, ...]:
        return tuple(
            PublishedRow(
                label=row.label,
                group=row.group,
                scores={name: score.mean for name, score in row.scores.items()},
            )
            for row in rows
        )

    @field_serializer("notes")
    def _all_notes(self, notes: Sequence[str]) -> tuple[str, ...]:
        return (*self.legend, *self.metric_legend, *notes)

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The legends and the notes."""
        return self._all_notes(self.notes)

    @property
    def grouped(self) -> bool:
        """Whether the groups have names."""
        return any(row.group for row in self.rows)

    @property
    def groups(self) -> list[tuple[str, list[Row]]]:
        """The groups in order with their lines; the paper's figures follow the row's own."""
        return [
            (name, [line for row in rows for line in (row, row.published) if line is not None])
            for name, rows in grouped(self.rows)
        ]

    def hacking_text(self, row: Row) -> str:
        """``no``, ``yes`` with what fell, or a dash where it cannot be told."""
        if row.reward_hacking is None:
            return NOTHING
        if not row.reward_hacking.flagged:
            return "no"
        return f"yes ({', '.join(self.column(name).label for name in row.reward_hacking.fell)})"

    def row(self, key: str) -> Row:
        """The row of that key."""
        return next(row for row in self.rows if row.key == key)

    def column(self, name: str) -> Column:
        """The score column or measure of that name."""
        return next(column for column in (*self.columns, *self.metrics) if column.name == name)


def grouped(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows by group; those of a group stand together."""
    return ((name, list(members)) for name, members in groupby(rows, lambda row: row.group))
