"""Experiments: which cells a table has, and what each changes of the profile."""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from pydantic import Field

from benchmarks.evaluation.protocol import CreditConfig
from benchmarks.evaluation.results import Key
from g2rpo.config import StrictModel, load_yaml, nearest, validate
from g2rpo.errors import UserError
from g2rpo.methods.presets import method_label
from g2rpo.policy import CheckpointConfig
from g2rpo.rewards.registry import REWARDS
from reproduce.bundled import named_file
from reproduce.experiment.profile import FolderName, Profile
from reproduce.experiment.table import (
    ColumnConfig,
    ColumnSpec,
    PaperKey,
    RowSpec,
    TableConfig,
    TableSpec,
)


class Budget(StrictModel):
    """Where a training ends, if not after its iterations: at a cost. One of the two is given."""

    evaluations_of: Key | None = None
    """A cell of the experiment: as many iterations as its rollouts' velocity evaluations allow."""
    device_seconds: Literal["profile"] | float | None = None
    """After the iteration that reaches so many device-seconds; ``profile`` is the profile's."""

    @pydantic.model_validator(mode="after")
    def _one(self) -> "Budget":
        if (self.evaluations_of is None) == (self.device_seconds is None):
            raise ValueError("budget: give evaluations_of or device_seconds, one of the two")
        return self


class CellConfig(StrictModel):
    """One row of a table: what is trained or loaded, and what it changes of the profile."""

    label: str | None = None
    """What its row is called; null is the method's label, or "Base"."""
    group: str | None = None
    """The heading of its row's group; null names the rewards that it is trained on."""
    paper: PaperKey | None = None
    """Names the paper's row, where it has one."""
    method: str | None = None
    """The method's name; null is not trained here: the base, or a ``checkpoint``."""
    checkpoint: CheckpointConfig | None = None
    """Weights trained elsewhere, which take the place of the base's transformer."""
    train: tuple[str, ...] = ()
    """The rewards it is trained on, by column name; of a checkpoint, as its authors state them."""
    preset: Literal["released", "matched"] | None = None
    """Overrides the experiment's preset."""
    learning_rate_key: str | None = None
    """Key into the profile's learning rates; null is the method's name."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes to the training configuration."""
    budget_overrides: bool = False
    """Whether the profile's ``budget_overrides`` is laid over its settings."""
    budget: Budget | None = None
    """Ends the training at a cost."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Changes to the evaluation protocol."""

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "CellConfig":
        if self.checkpoint is not None:
            if self.method is not None or self.set or self.preset or self.learning_rate_key:
                raise ValueError(
                    "a cell is trained (method) or loaded (checkpoint), not both: with a "
                    "checkpoint leave out method, set, preset and learning_rate_key"
                )
            return self
        if self.method is None and (self.train or self.set or self.budget):
            raise ValueError("the base (no method) takes neither train nor set nor budget")
        if self.method is not None and not self.train:
            raise ValueError("train is empty: name at least one reward")
        if len(set(self.train)) < len(self.train):
            raise ValueError("train names a reward twice")
        return self


class Experiment(StrictModel):
    """One table or study."""

    name: FolderName
    preset: Literal["released", "matched"] = "matched"
    policy: str | None = None
    """Hub id of the base that its checkpoints belong to; None where any policy will do."""
    cells: dict[Key, CellConfig] = Field(min_length=1)
    credit: CreditConfig | None = None
    """Measures the credit of the cells' rollouts, in place of training and scoring them."""
    table: TableConfig
    """What is shown; the rows are the cells."""

    @property
    def trains(self) -> bool:
        """Whether any of its cells is trained here."""
        return any(cell.method is not None for cell in self.cells.values())

    def table_spec(self, profile: Profile) -> TableSpec:
        """The table under ``profile``, whose rewards are its columns unless it names others.

        Raises:
            UserError: a column is no reward, or rows of a group do not stand together; in one line.
        """
        rewards = profile.rewards
        methods = {cell.method for cell in self.cells.values() if cell.method is not None}
        labels = {method: method_label(method) for method in methods}
        columns = self.table.columns or [ColumnConfig(reward=name) for name in rewards]
        for column in columns:
            if column.reward not in {*rewards, *REWARDS}:
                raise UserError(
                    f"{self.name}: table.columns shows {column.reward!r}, which is no reward of "
                    f"the profile {profile.name}; {nearest(column.reward, rewards)}"
                )
        shared = self.table.model_dump(exclude={"name", "columns", "digits"})
        spec = {
            **shared,
            "name": self.table.name or self.name,
            "rows": [self._row(key, cell, labels, profile) for key, cell in self.cells.items()],
            "columns": [_column(column, profile, self.table.digits) for column in columns],
            "paper_model": profile.paper_model,
        }
        return validate(TableSpec, spec, f"experiment {self.name}, table")

    def _row(
        self, key: str, cell: CellConfig, labels: Mapping[str, str], profile: Profile
    ) -> RowSpec:
        base = "Base" if cell.checkpoint is None else key
        group = " & ".join(profile.label(name) for name in cell.train)
        if cell.method is None:
            group = ""
        return RowSpec(
            key=key,
            label=cell.label or (base if cell.method is None else labels[cell.method]),
            group=group if cell.group is None else cell.group,
            train=cell.train,
            paper=cell.paper,
        )

    @pydantic.model_validator(mode="after")
    def _credit_is_of_methods(self) -> "Experiment":
        if self.credit is not None:
            for key, cell in self.cells.items():
                if cell.method is None:
                    raise ValueError(f"credit is measured of methods, and cells.{key} has none")
        return self

    @pydantic.model_validator(mode="after")
    def _budgets_are_of_cells(self) -> "Experiment":
        for key, cell in self.cells.items():
            wanted = None if cell.budget is None else cell.budget.evaluations_of
            if wanted is None:
                continue
            if wanted not in self.cells:
                hint = nearest(wanted, self.cells)
                raise ValueError(f"cells.{key}.budget.evaluations_of: no cell {wanted!r}; {hint}")
            if self.cells[wanted].method is None or self.cells[wanted].budget is not None:
                raise ValueError(
                    f"cells.{key}.budget.evaluations_of: {wanted!r} must be a cell that is trained "
                    "without a budget of its own"
                )
        return self


def _column(column: ColumnConfig, profile: Profile, digits: int) -> ColumnSpec:
    reward = profile.rewards.get(column.reward)
    return ColumnSpec(
        reward=column.reward,
        label=column.label or profile.label(column.reward),
        paper=column.paper or (None if reward is None else reward.paper),
        digits=digits if column.digits is None else column.digits,
    )


def load_experiment(name: str) -> Experiment:
    """A bundled experiment by name, or a YAML file."""
    data = load_yaml(named_file("experiments", name))
    return validate(Experiment, data, f"experiment {name}")
