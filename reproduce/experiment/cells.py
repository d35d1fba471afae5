"""Experiments: the cells of a table, and what each changes of the profile."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from benchmarks.evaluation.protocol import CreditConfig
from benchmarks.evaluation.results import Key
from g2rpo.config import StrictModel, load_yaml, merge, nearest, validate
from g2rpo.errors import UserError
from g2rpo.methods.presets import method_label
from g2rpo.policy import CheckpointConfig
from g2rpo.rewards.registry import REWARDS
from reproduce.bundled import ROOT, absolute, named_file
from reproduce.experiment.profile import FolderName, Profile
from reproduce.experiment.table import (
    ColumnConfig,
    ColumnSpec,
    PaperKey,
    RowSpec,
    TableConfig,
    TableSpec,
    TruthSource,
)

Preset = Literal["released", "matched", "efficient"]
"""``released``: the settings of the method's own code. ``matched``: equal in everything but the
method. ``efficient``: the most reward at a given cost; only some methods have it."""


class Budget(StrictModel):
    """A cost at which training ends, instead of after its iterations. Exactly one key is set."""

    evaluations_of: Key | None = None
    """A cell of the experiment: train for as many iterations as fit its rollouts' NFE."""
    cost_of: Key | None = None
    """A cell of the experiment: train until the equal cost (docs/mathematics.md) is as high."""
    device_seconds: Literal["profile"] | float | None = None
    """End after the iteration that reaches this many device-seconds; ``profile``: the profile's."""

    @pydantic.model_validator(mode="after")
    def _one(self) -> "Budget":
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError(
                "budget: set exactly one of evaluations_of, cost_of and device_seconds"
            )
        return self

    @property
    def reference(self) -> str | None:
        """The cell whose cost it is, if any."""
        return self.evaluations_of or self.cost_of


class CellConfig(StrictModel):
    """One row of a table: what to train or load, and what it changes of the profile."""

    label: str | None = None
    """Label of its row; null is the method's label, or "Base"."""
    group: str | None = None
    """Heading of its row's group; null names the training rewards."""
    paper: PaperKey | None = None
    """The corresponding row of the paper, if any."""
    method: str | None = None
    """Name of the method; null if not trained here (the base, or a ``checkpoint``)."""
    checkpoint: CheckpointConfig | None = None
    """Weights trained elsewhere, which replace the base's transformer."""
    train: tuple[str, ...] = ()
    """Training rewards by column name; for a checkpoint, as stated by its authors."""
    preset: Preset | None = None
    """Overrides the experiment's preset."""
    learning_rate_key: str | None = None
    """Key in the profile's ``learning_rates``; null is the method's name."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes to the training configuration."""
    budget_overrides: bool = False
    """Whether to apply the profile's ``budget_overrides``."""
    budget: Budget | None = None
    """A cost at which training ends."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Changes to the evaluation protocol."""

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "CellConfig":
        if self.checkpoint is not None:
            if self.method is not None or self.set or self.preset or self.learning_rate_key:
                raise ValueError(
                    "a cell is trained (method) or loaded (checkpoint), not both; with a "
                    "checkpoint, remove method, set, preset and learning_rate_key"
                )
            return self
        if self.method is None and (self.train or self.set or self.budget):
            raise ValueError("a cell without a method (the base) cannot have train, set or budget")
        if self.method is not None and not self.train:
            raise ValueError("train is empty; name at least one reward")
        if len(set(self.train)) < len(self.train):
            raise ValueError("train repeats a reward")
        return self


class Experiment(StrictModel):
    """One table or study."""

    name: FolderName
    preset: Preset = "matched"
    policy: str | None = None
    """Hub id of the base that its checkpoints belong to; None for any policy."""
    learning_rates: tuple[float, ...] = ()
    """Trains every cell once at each of these, as a cell of its own: ``<cell>/lr<rate>``."""
    cells: dict[Key, CellConfig] = Field(min_length=1)
    credit: CreditConfig | None = None
    """Measure the credit of the cells' rollouts instead of training and scoring them."""
    table: TableConfig
    """What the table shows; its rows are the cells."""

    @property
    def trains(self) -> bool:
        """Whether any cell is trained here."""
        return any(cell.method is not None for cell in self.cells.values())

    def table_spec(self, profile: Profile) -> TableSpec:
        """The table under ``profile``; by default its columns are the profile's rewards.

        Raises:
            UserError: a column is not a reward, or the rows of a group are not adjacent.
        """
        rewards = profile.rewards
        methods = {cell.method for cell in self.cells.values() if cell.method is not None}
        labels = {method: method_label(method) for method in methods}
        columns = self.table.columns or [ColumnConfig(reward=name) for name in rewards]
        for column in columns:
            if column.reward not in {*rewards, *REWARDS}:
                raise UserError(
                    f"{self.name}: table.columns: profile {profile.name} has no reward "
                    f"{column.reward!r}; {nearest(column.reward, rewards)}"
                )
        shared = self.table.model_dump(exclude={"name", "columns", "digits"})
        spec = {
            **shared,
            "name": self.table.name or self.name,
            "rows": [self._row(key, cell, labels, profile) for key, cell in self.cells.items()],
            "columns": [_column(column, profile, self.table.digits) for column in columns],
            "paper_model": profile.paper_model,
            "truth": self._truth(profile),
        }
        return validate(TableSpec, spec, f"experiment {self.name}, table")

    def _truth(self, profile: Profile) -> TruthSource | None:
        """The truth of the one split that all cells are evaluated on."""
        default = profile.evaluation.split
        splits = {str(cell.evaluation.get("split", default)) for cell in self.cells.values()}
        if profile.truth is None or len(splits) > 1:
            return None
        (split,) = splits
        captions = absolute(getattr(profile.prompts, split))
        source = TruthSource(file=absolute(profile.truth), split=split, captions=captions)
        published = ROOT / "results" / profile.name / "truth"
        if not Path(source.file).is_file() and published.is_dir():
            # Published results keep what their headroom needs: the world may not be built here.
            return TruthSource(
                file=str(published / "truth.json"),
                split=split,
                captions=str(published / Path(captions).name),
            )
        return source

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

    @pydantic.field_validator("cells")
    @classmethod
    def _at_every_learning_rate(
        cls, cells: dict[str, CellConfig], info: pydantic.ValidationInfo
    ) -> dict[str, CellConfig]:
        """Replaces each cell by one per rate, in a group with its label."""
        rates = info.data.get("learning_rates", ())
        if len(set(rates)) < len(rates):
            raise ValueError("learning_rates repeats a rate")
        trials = {}
        for key, cell in cells.items() if rates else ():
            if cell.method is None:
                raise ValueError(f"{key}: learning_rates needs cells with a method")
            group = cell.label or method_label(cell.method)
            for rate in rates:
                mantissa, exponent = f"{rate:.6e}".split("e")
                text = f"{float(mantissa):g}e{int(exponent)}"
                settings = merge(cell.set, {"optimization": {"learning_rate": rate}})
                changes = {"label": text, "group": group, "set": settings}
                trials[f"{key}/lr{text}"] = cell.model_copy(update=changes)
        return trials or cells

    @pydantic.model_validator(mode="after")
    def _cells_have_what_is_asked_of_them(self) -> "Experiment":
        for key, cell in self.cells.items():
            if self.credit is not None and cell.method is None:
                raise ValueError(f"credit needs a method, and cells.{key} has none")
            wanted = None if cell.budget is None else cell.budget.reference
            if wanted is None:
                continue
            if wanted not in self.cells:
                hint = nearest(wanted, self.cells)
                raise ValueError(f"cells.{key}.budget: no cell {wanted!r}; {hint}")
            if self.cells[wanted].method is None or self.cells[wanted].budget is not None:
                raise ValueError(
                    f"cells.{key}.budget: {wanted!r} must be a trained cell without a budget of "
                    "its own"
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
    """Loads a bundled experiment by name, or a YAML file.

    Raises:
        UserError: no such experiment, or it is invalid.
    """
    data = load_yaml(named_file("experiments", name))
    return validate(Experiment, data, f"experiment {name}")
