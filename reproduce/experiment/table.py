"""The ``table`` section of an experiment's YAML, and the rows and columns it resolves to."""

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from benchmarks.evaluation.results import Key, Name
from g2rpo.config import StrictModel, nearest

TableName = Literal["table1", "table2", "table3"]
"""A table of the paper."""
PaperColumn = Literal["HPS", "CLIP", "PS", "IR", "UR"]

CostColumn = Literal[
    "rollout_evaluations",
    "training_forwards",
    "training_backwards",
    "images_scored",
    "device_seconds",
    "equal_cost_evaluations",
    "iterations",
]

DEFAULT_COSTS: tuple[CostColumn, ...] = (
    "rollout_evaluations",
    "training_forwards",
    "training_backwards",
    "images_scored",
    "device_seconds",
)


class PaperKey(StrictModel):
    """Selects a row of one of the paper's tables; null keys match anything."""

    train: tuple[PaperColumn, ...] | None = None
    method: str | None = None
    granularities: tuple[int, ...] | None = None
    steps: int | None = None


def _named(value: Any) -> Any:
    return {"reward": value} if isinstance(value, str) else value


class ColumnConfig(StrictModel):
    """One score column in YAML: the name of a reward, or a mapping."""

    reward: str
    """Name of the reward model, as in the scores."""
    label: str | None = None
    """Heading; null is the label of the profile's reward."""
    paper: PaperColumn | None = None
    """The paper's column for the same role; null is the one of the profile's reward."""
    digits: int | None = Field(None, ge=0, le=6)
    """Decimals; null is the table's."""


class ColumnSpec(ColumnConfig):
    """One score column, resolved."""

    label: str
    digits: int = Field(3, ge=0, le=6)


class RowSpec(StrictModel):
    """One row."""

    key: Key
    """The row key of its cells."""
    label: str
    group: str = ""
    """Heading of the group; rows of a group are adjacent and compared."""
    train: tuple[str, ...] = ()
    """The training rewards: the row's in-domain columns."""
    paper: PaperKey | None = None
    """The corresponding row of the paper, if any."""


class TableConfig(StrictModel):
    """The ``table`` section of an experiment's YAML; its rows are the experiment's cells."""

    name: Name | None = None
    """File stem; null is the experiment's name."""
    title: str
    """Heading and LaTeX caption."""
    columns: (
        Annotated[tuple[Annotated[ColumnConfig, BeforeValidator(_named)], ...], Field(min_length=1)]
        | None
    ) = None
    """Score columns in order; null shows every reward of the profile."""
    digits: int = Field(3, ge=0, le=6)
    """Decimals of the score columns."""
    group_label: str = "Trained on"
    """Heading of the group column."""
    row_label: str = "Method"
    """Heading of the row column."""
    paper_table: TableName | None = None
    """The paper's table whose numbers are shown."""
    costs: tuple[CostColumn, ...] = DEFAULT_COSTS
    """Cost columns in order."""
    focus: tuple[Key, ...] = ()
    """Rows that the summary compares with each other row of their group."""
    baseline: Key | None = None
    """A row that the summary also compares the focus rows with."""
    primary: dict[Key, tuple[Key, ...]] = Field(default_factory=dict)
    """The comparisons that matter most, best chosen before the run: rows, each with the rows of its
    group to compare it with, in-domain and out-of-domain. They are corrected apart from all
    others."""
    notes: tuple[str, ...] = ()
    """Sentences printed under the table."""
    figures: tuple[Literal["frontier"], ...] = ()
    """Figures besides the learning curves. ``frontier``: validation rewards against cost."""


class TruthSource(StrictModel):
    """The scores of the ground-truth images of the held-out captions, which define the headroom."""

    file: str
    split: str
    captions: str
    """The prompt file of the split."""


class TableSpec(TableConfig):
    """One table under one profile, with its resolved rows and columns."""

    name: Name
    rows: tuple[RowSpec, ...] = Field(min_length=1)
    """Rows in order; the rows of a group are adjacent."""
    columns: tuple[ColumnSpec, ...] = Field(min_length=1)
    paper_model: bool = False
    """Whether the policy is the paper's, so that its numbers are shown next to ours; otherwise they
    are shown in a separate block."""
    truth: TruthSource | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "TableSpec":
        keys = [row.key for row in self.rows]
        if double := _first_double(keys):
            raise ValueError(f"duplicate row {double!r}")
        if double := _first_double(name for name, _ in groupby(row.group for row in self.rows)):
            raise ValueError(f"the rows of group {double!r} are not adjacent")
        if double := _first_double(column.reward for column in self.columns):
            raise ValueError(f"duplicate column {double!r}")
        if double := _first_double(self.costs):
            raise ValueError(f"duplicate cost column {double!r}")
        for key in (*self.focus, *([self.baseline] if self.baseline else [])):
            if key not in keys:
                raise ValueError(f"focus or baseline: no row {key!r}")
        self._check_primary()
        if self.paper_table is None and any(row.paper for row in self.rows):
            raise ValueError("rows have `paper`, but paper_table is not given")
        return self

    def _check_primary(self) -> None:
        rows = {row.key: row for row in self.rows}
        if self.primary and self.baseline is None:
            raise ValueError("primary needs a baseline, which defines the unit of its differences")
        for key, others in self.primary.items():
            for name in (key, *others):
                if name not in rows:
                    raise ValueError(f"primary: no row {name!r}; {nearest(name, rows)}")
                row, first = rows[name], rows[key]
                if (row.group, row.train) != (first.group, first.train):
                    raise ValueError(
                        f"primary: {key!r} and {name!r} differ in their group or training rewards"
                    )
            if double := _first_double((key, *others)):
                raise ValueError(f"primary: {key!r} names {double!r} twice")

    def groups(self) -> tuple[tuple[str, tuple[RowSpec, ...]], ...]:
        """The groups in order, each with its rows."""
        return tuple((name, tuple(rows)) for name, rows in groupby(self.rows, lambda r: r.group))


def _first_double(names: Iterable[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)
