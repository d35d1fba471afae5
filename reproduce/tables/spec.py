"""What a table shows: the ``table`` section of an experiment's YAML."""

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Literal

import pydantic

from benchmarks.evaluation.metrics import DISTANCE, DRIFT, VENDI
from benchmarks.evaluation.results import Key, Name
from g2rpo.config import StrictModel
from g2rpo.errors import UserError
from reproduce.tables.paper import PaperColumn, PaperKey, TableName

CostColumn = Literal[
    "rollout_evaluations",
    "training_forwards",
    "training_backwards",
    "images_scored",
    "device_seconds",
    "equal_cost_evaluations",
    "iterations",
]

COST_LABELS: dict[CostColumn, str] = {
    "rollout_evaluations": "Rollout evaluations",
    "training_forwards": "Training forwards",
    "training_backwards": "Training backwards",
    "images_scored": "Images scored",
    "device_seconds": "Device-seconds",
    "equal_cost_evaluations": "Rollout evaluations + 3 × backwards",
    "iterations": "Iterations",
}

METRIC_LABELS: dict[str, str] = {
    DISTANCE: "Image distance",
    VENDI: "Vendi score",
    DRIFT: "Drift",
}
"""The columns beside the rewards, in order; a table has those that its cells were measured in."""

DEFAULT_COSTS: tuple[CostColumn, ...] = (
    "rollout_evaluations",
    "training_forwards",
    "training_backwards",
    "images_scored",
    "device_seconds",
)


class ColumnSpec(StrictModel):
    """One score column.

    Attributes:
        reward: the reward model's name, as in the score tables.
        label: the heading.
        paper: the paper's column for the same reward, or the one whose role it takes.
        profiles: the profiles whose table has this column; None for every profile.
        digits: decimals shown.
    """

    reward: str
    label: str
    paper: PaperColumn | None = None
    profiles: tuple[str, ...] | None = None
    digits: int = pydantic.Field(3, ge=0, le=6)


class RowSpec(StrictModel):
    """One row.

    Attributes:
        key: the row key of its cells.
        label: what the row is called.
        group: rows of one group stand together and are compared; the heading of the group.
        train: the rewards the row is trained on: its in-domain columns.
        paper: names the paper's row, where it has one.
    """

    key: Key
    label: str
    group: str = ""
    train: tuple[str, ...] = ()
    paper: PaperKey | None = None


def _first_double(names: Iterable[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)


class TableSpec(StrictModel):
    """One table.

    Attributes:
        name: stem of the rendered files.
        title: heading and LaTeX caption.
        rows: in order; the rows of a group next to each other.
        columns: in order.
        group_label: heading of the column that names the groups.
        row_label: heading of the column that names the rows.
        paper_table: the paper's table whose figures are shown.
        paper_profiles: profiles whose policy is the paper's own, so that its figures may stand
            next to ours; for every other profile they are a separate block.
        costs: the cost columns.
        focus: keys of the rows that a reading compares with each other row of their group.
        baseline: key of the row that a reading compares the focus rows with as well.
        notes: sentences printed under the table.
    """

    name: Name
    title: str
    rows: tuple[RowSpec, ...] = pydantic.Field(min_length=1)
    columns: tuple[ColumnSpec, ...] = pydantic.Field(min_length=1)
    group_label: str = "Trained on"
    row_label: str = "Method"
    paper_table: TableName | None = None
    paper_profiles: tuple[str, ...] = ("flux", "flux-8gpu", "flux-lora", "flux-lora-40gb")
    costs: tuple[CostColumn, ...] = DEFAULT_COSTS
    focus: tuple[Key, ...] = ()
    baseline: Key | None = None
    notes: tuple[str, ...] = ()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "TableSpec":
        keys = [row.key for row in self.rows]
        if double := _first_double(keys):
            raise ValueError(f"the row {double!r} is there twice")
        if double := _first_double(name for name, _ in groupby(row.group for row in self.rows)):
            raise ValueError(f"the rows of the group {double!r} do not stand together")
        if double := _first_double(self.costs):
            raise ValueError(f"the cost column {double!r} is there twice")
        for key in (*self.focus, *([self.baseline] if self.baseline else [])):
            if key not in keys:
                raise ValueError(f"focus or baseline names {key!r}, which is no row")
        if self.paper_table is None and any(row.paper for row in self.rows):
            raise ValueError("rows name the paper's rows, but paper_table is not given")
        return self

    def columns_for(self, profile: str) -> tuple[ColumnSpec, ...]:
        """The score columns of a profile's table.

        Raises:
            UserError: two of them show the same reward, or there is none.
        """
        shown = tuple(c for c in self.columns if c.profiles is None or profile in c.profiles)
        if not shown:
            raise UserError(f"table {self.name!r} has no column for the profile {profile!r}")
        if double := _first_double(column.reward for column in shown):
            raise UserError(f"table {self.name!r} shows the reward {double!r} twice")
        return shown

    def groups(self) -> tuple[tuple[str, tuple[RowSpec, ...]], ...]:
        """The groups in order, each with its rows."""
        return tuple((name, tuple(rows)) for name, rows in groupby(self.rows, lambda r: r.group))
