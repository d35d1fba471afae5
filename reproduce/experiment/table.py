"""What a table shows: the ``table`` section of an experiment's YAML, and its rows and columns."""

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from benchmarks.evaluation.results import Key, Name
from g2rpo.config import StrictModel

TableName = Literal["table1", "table2", "table3"]
"""Of the paper."""
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
    """Names one row of one of the paper's tables; what is not given is not looked at."""

    train: tuple[PaperColumn, ...] | None = None
    method: str | None = None
    granularities: tuple[int, ...] | None = None
    steps: int | None = None


def _named(value: Any) -> Any:
    return {"reward": value} if isinstance(value, str) else value


class ColumnConfig(StrictModel):
    """One score column as a YAML has it: a reward's name alone, or with what is not its default."""

    reward: str
    """The reward model's name, as in the score tables."""
    label: str | None = None
    """The heading; null is the label of the profile's reward."""
    paper: PaperColumn | None = None
    """The paper's column for the same reward, or the one whose role it takes; null as above."""
    digits: int | None = Field(None, ge=0, le=6)
    """Decimals shown; null is the table's."""


class ColumnSpec(ColumnConfig):
    """One score column, every choice made."""

    label: str
    digits: int = Field(3, ge=0, le=6)


class RowSpec(StrictModel):
    """One row."""

    key: Key
    """The row key of its cells."""
    label: str
    group: str = ""
    """Rows of one group stand together and are compared; the heading of the group."""
    train: tuple[str, ...] = ()
    """The rewards the row is trained on: its in-domain columns."""
    paper: PaperKey | None = None
    """Names the paper's row, where it has one."""


class TableConfig(StrictModel):
    """The section ``table`` of an experiment's YAML. Its rows are the experiment's cells."""

    name: Name | None = None
    """Stem of the rendered files; null is the experiment's name."""
    title: str
    """Heading and LaTeX caption."""
    columns: (
        Annotated[tuple[Annotated[ColumnConfig, BeforeValidator(_named)], ...], Field(min_length=1)]
        | None
    ) = None
    """In order; null shows every reward of the profile."""
    digits: int = Field(3, ge=0, le=6)
    """Decimals of the columns."""
    group_label: str = "Trained on"
    """Heading of the column that names the groups."""
    row_label: str = "Method"
    """Heading of the column that names the rows."""
    paper_table: TableName | None = None
    """The paper's table whose figures are shown."""
    costs: tuple[CostColumn, ...] = DEFAULT_COSTS
    """The cost columns."""
    focus: tuple[Key, ...] = ()
    """Rows that a reading compares with each other row of their group."""
    baseline: Key | None = None
    """The row that a reading compares the focus rows with as well."""
    notes: tuple[str, ...] = ()
    """Sentences printed under the table."""


class TableSpec(TableConfig):
    """One table under one profile: its rows and columns with all that is shown of them."""

    name: Name
    rows: tuple[RowSpec, ...] = Field(min_length=1)
    """In order; the rows of a group next to each other."""
    columns: tuple[ColumnSpec, ...] = Field(min_length=1)
    paper_model: bool = False
    """Whether the policy is the paper's own, so that its figures may stand next to ours; those of
    another policy stand in a block of their own."""

    @model_validator(mode="after")
    def _consistent(self) -> "TableSpec":
        keys = [row.key for row in self.rows]
        if double := _first_double(keys):
            raise ValueError(f"the row {double!r} is there twice")
        if double := _first_double(name for name, _ in groupby(row.group for row in self.rows)):
            raise ValueError(f"the rows of the group {double!r} do not stand together")
        if double := _first_double(column.reward for column in self.columns):
            raise ValueError(f"the reward {double!r} is shown twice")
        if double := _first_double(self.costs):
            raise ValueError(f"the cost column {double!r} is there twice")
        for key in (*self.focus, *([self.baseline] if self.baseline else [])):
            if key not in keys:
                raise ValueError(f"focus or baseline names {key!r}, which is no row")
        if self.paper_table is None and any(row.paper for row in self.rows):
            raise ValueError("rows name the paper's rows, but paper_table is not given")
        return self

    def groups(self) -> tuple[tuple[str, tuple[RowSpec, ...]], ...]:
        """The groups in order, each with its rows."""
        return tuple((name, tuple(rows)) for name, rows in groupby(self.rows, lambda r: r.group))


def _first_double(names: Iterable[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)
