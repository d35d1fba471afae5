"""Experiments: which cells a table has, and what each changes of the profile."""

from typing import Any, Literal

import pydantic
from pydantic import Field

from benchmarks.evaluation.protocol import CreditConfig
from benchmarks.evaluation.results import Key
from g2rpo.config import StrictModel, load_yaml, nearest, validate
from g2rpo.policy import CheckpointConfig
from reproduce.experiment.bundled import FolderName, named_file
from reproduce.tables.spec import TableSpec


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
    table: TableSpec

    @property
    def trains(self) -> bool:
        """Whether any of its cells is trained here."""
        return any(cell.method is not None for cell in self.cells.values())

    @pydantic.model_validator(mode="after")
    def _rows_have_cells(self) -> "Experiment":
        for row in self.table.rows:
            if row.key not in self.cells:
                raise ValueError(f"table.rows names {row.key!r}, which is no cell")
        return self

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


def load_experiment(name: str) -> Experiment:
    """A bundled experiment by name, or a YAML file.

    The in-domain columns of a table's rows are those that its cells train on.
    """
    path = named_file("experiments", name, "experiment")
    data = load_yaml(path)
    cells, table = data.get("cells"), data.get("table")
    if isinstance(cells, dict) and isinstance(table, dict):
        rows = table.get("rows")
        for row in rows if isinstance(rows, list) else []:
            key = row.get("key") if isinstance(row, dict) else None
            cell = cells.get(key) if isinstance(key, str) else None
            if isinstance(cell, dict) and "train" in cell:
                row.setdefault("train", cell["train"])
    return validate(Experiment, data, f"experiment {name}")
