"""A computed table as one immutable object; every format is a pure function of it.

``<name>.json`` is the dump of this model. Fields that only presentation needs (:func:`hidden`) are
excluded from it.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from pydantic import Field, field_serializer

from benchmarks.evaluation.metrics import DISTANCE, DRIFT, VENDI
from benchmarks.evaluation.results import Cost, Protocol, Provenance
from benchmarks.evaluation.statistics import ALPHA, NOTHING, Label, fixed
from g2rpo.config import StrictModel, unhashed
from reproduce.experiment.table import CostColumn, PaperColumn

IN_DOMAIN = "†"
HACKING_LABEL = "Reward hacking"
NOT_SIGNIFICANT = "not significant"
VERDICTS = (
    "higher",
    "lower",
    "higher before correction only",
    "lower before correction only",
    NOT_SIGNIFICANT,
)
COST_LABELS: dict[CostColumn, str] = {
    "rollout_evaluations": "Rollout evaluations",
    "training_forwards": "Training forwards",
    "training_backwards": "Training backwards",
    "images_scored": "Images scored",
    "device_seconds": "Device-seconds",
    "equal_cost_evaluations": "Rollout evaluations + 3 × backwards",
    "iterations": "Iterations",
}
METRIC_LABELS = {DISTANCE: "Image distance", VENDI: "Vendi score", DRIFT: "Drift"}
"""The metrics beside the rewards, in the order of their columns."""

Question = Literal["primary", "order", "rows", "baseline"]
PaperVerdict = Literal["confirmed", "same direction", "opposite direction", "contradicted"]


def hidden(default: Any) -> Any:
    """A field excluded from the JSON document."""
    return Field(default, exclude=True)


class Number(StrictModel):
    """A mean with its confidence interval."""

    mean: float
    low: float | None = None
    high: float | None = None
    about: Label | None = None
    """``checkpoint`` (prompt-level) or ``method`` (seed-level); absent for a published figure."""
    count: int | None = None
    """Number of prompts (checkpoint) or seeds (method)."""
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


class RowComparison(StrictModel):
    """Two rows compared on one score: first minus second."""

    first: str
    second: str
    reward: str
    """A score column, or one of the table's measures."""
    question: Question
    """``primary``: declared in the experiment. ``order``: any two of these rows. Else the second is
    another row of the group, or the baseline."""
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float
    family: int
    """Number of comparisons corrected together."""
    about: Label
    count: int
    level: float
    improvement: Number
    """Probability of improvement: that the first scores higher on a prompt."""
    verdict: str
    """One of :data:`VERDICTS`."""
    detectable: float | None = None
    """The difference that these seeds find with probability 0.8, given their spread; of primary
    comparisons."""
    equivalent: bool | None = None
    """Whether the interval lies within 2 % of the headroom; None without headroom."""
    published_difference: float | None = None
    """The paper's, to its printed decimals."""
    cost_ratios: dict[CostColumn, float] = hidden({})
    """Training cost of the first divided by the second's."""

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.p_holm < ALPHA

    @property
    def paper_verdict(self) -> PaperVerdict | None:
        """How the direction relates to the paper's; None if the paper reports none."""
        if not self.published_difference or self.difference == 0:
            return None
        same = (self.published_difference > 0) == (self.difference > 0)
        if self.significant:
            return "confirmed" if same else "contradicted"
        return "same direction" if same else "opposite direction"


class Score(Number):
    """A number in a score column."""

    in_domain: bool
    """The row was trained on this column's reward."""
    best: bool
    """No row of its group prints a higher figure, and at least one other has a figure."""
    mark: RowComparison | None = hidden(None)
    """The row minus its reference; Holm's correction is over the scores of the row."""


class RewardHacking(StrictModel):
    """Signs of reward hacking: a training reward rose while something else fell."""

    flagged: bool
    rose: tuple[str, ...]
    """In-domain rewards significantly above the baseline."""
    fell: tuple[str, ...]
    """Out-of-domain rewards and diversity metrics significantly below it."""


class Source(StrictModel):
    """One cell behind a row."""

    seed: int | None = None
    runs: dict[str, str]
    """Run names, which end in a hash of the configuration and inputs."""
    iteration: int | None = None
    protocol: str
    """Hash of one of the document's protocols."""
    origin: str
    """Key of one of the document's origins."""
    cost: Cost | None = None


class Row(StrictModel):
    """One line of a table: one of our rows or, without a key, the paper's figures."""

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
    """By column; unscored columns are absent."""
    headroom: dict[str, Number] = unhashed({})
    """Shares of the headroom: ``in_domain``, ``out_of_domain``, and of each reward."""
    metrics: dict[str, Number] = Field(default_factory=dict)
    reward_hacking: RewardHacking | None = None
    """None if it cannot be tested."""
    costs: dict[str, float] = Field(default_factory=dict)
    """Means over the seeds."""
    sources: tuple[Source, ...] = ()
    full_label: str = hidden("")
    """The label with the group, for use outside the table."""
    every_cost: dict[CostColumn, float] = hidden({})
    """Every cost, including those that the table does not show."""
    published: "Row | None" = hidden(None)
    """The paper's figures, if shown below the row."""

    @property
    def from_paper(self) -> bool:
        """Whether the figures are the paper's."""
        return not self.key

    @property
    def about(self) -> Label | None:
        """The kind of its intervals; None if it has none."""
        return next((s.about for s in self.scores.values() if s.about is not None), None)


class Column(StrictModel):
    """A reward, metric or cost column."""

    name: str
    label: str
    cite: tuple[str, ...] = ()
    digits: int = hidden(3)
    paper: PaperColumn | None = hidden(None)
    """The paper's column for the same reward, or for the reward it stands in for."""


class PublishedRow(StrictModel):
    """The paper's figures in the document."""

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
    measures: tuple[Column, ...] = unhashed(())
    """Means over the in-domain and the out-of-domain columns on one scale, where there is one."""
    metrics: tuple[Column, ...] = ()
    """The metrics that any row has."""
    costs: tuple[Column, ...] = ()
    rows: tuple[Row, ...]
    comparisons: tuple[RowComparison, ...] = ()
    published: tuple[Row, ...] = ()
    """The paper's rows: below ours, or in their own block if they are not comparable."""
    published_source: str | None = None
    """Caption of the paper's block; None if there is no such block."""
    protocols: tuple[Protocol, ...] = ()
    """Protocols under which the held-out prompts were sampled."""
    origins: dict[str, Provenance] = Field(default_factory=dict)
    notes: tuple[str, ...]
    """Sentences below the table; in the document the legends come first."""
    references: tuple[str, ...] = ()
    """Keys of the BibTeX file beside the document."""
    group_label: str = hidden("")
    row_label: str = hidden("")
    legend: tuple[str, ...] = hidden(())
    """What the marks and intervals in the table mean."""
    metric_legend: tuple[str, ...] = hidden(())
    published_columns: tuple[Column, ...] = hidden(())
    same_model: bool = hidden(False)
    """Whether the profile trains the paper's model."""
    styles: "Table | None" = hidden(None)
    """The scores by prompt style, if the prompt set has several."""

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
    def lines(self) -> list[Row]:
        """All rows in order, each followed by the paper's figures for it."""
        return [line for row in self.rows for line in (row, row.published) if line is not None]

    def hacking_text(self, row: Row) -> str:
        """``no``, ``yes`` with what fell, or a dash if it cannot be tested."""
        if row.reward_hacking is None:
            return NOTHING
        if not row.reward_hacking.flagged:
            return "no"
        return f"yes ({', '.join(self.column(name).label for name in row.reward_hacking.fell)})"

    def row(self, key: str) -> Row:
        """The row with that key."""
        return next(row for row in self.rows if row.key == key)

    def column(self, name: str) -> Column:
        """The reward, measure or metric column of that name."""
        columns = (*self.columns, *self.measures, *self.metrics)
        return next(column for column in columns if column.name == name)

    def asked(self, *questions: Question) -> list[RowComparison]:
        """The comparisons of these kinds."""
        return [one for one in self.comparisons if one.question in questions]

    @property
    def headroom_columns(self) -> tuple[Column, ...]:
        """The measures that any row has as a share of the headroom."""
        return tuple(c for c in self.measures if any(c.name in row.headroom for row in self.rows))


def grouped(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Consecutive rows by group."""
    return ((name, list(members)) for name, members in groupby(rows, lambda row: row.group))
