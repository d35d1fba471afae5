"""Where the files of a cell are, by the hash of what they are made from."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from benchmarks.evaluation.results import cells_folder
from g2rpo.config import content_hash
from g2rpo.provenance import source_fingerprint
from reproduce.experiment import ResolvedCell
from reproduce.experiment import fingerprint as runs


def _remembered(find: "Callable[[Layout, ResolvedCell], Path]") -> "Callable[..., Path]":
    @functools.wraps(find)
    def once(layout: "Layout", cell: ResolvedCell) -> Path:
        if layout.known is None:
            return find(layout, cell)
        key = (find.__name__, id(cell))
        if key not in layout.known:
            layout.known[key] = cell, find(layout, cell)  # keeping the cell keeps its id unique
        return layout.known[key][1]

    return once


@dataclass(frozen=True)
class Layout:
    """Paths of runs and tables.

    Attributes:
        runs: training runs and evaluations, by the hash of their inputs.
        tables: ``<profile>/<experiment>/`` with cells, tables and figures.
        known: remembered paths by kind and cell; None to compute each path again.
    """

    runs: Path
    tables: Path
    known: dict[tuple[str, int], tuple[ResolvedCell, Path]] | None = field(
        default=None, repr=False, compare=False
    )

    def remembering(self) -> Self:
        """A copy that hashes each cell once, for use while no input changes.

        Computing a path hashes the cell's whole configuration, and a plan needs it a dozen times.
        """
        return replace(self, known={})

    @_remembered
    def training(self, cell: ResolvedCell) -> Path:
        """The run folder of a cell; the base and each checkpoint have their own."""
        if cell.checkpoint is not None:
            inputs = {
                "base": runs.policy_inputs(cell.policy)["weights"],
                "checkpoint": runs.checkpoint_inputs(cell.checkpoint),
            }
            return self.runs / f"checkpoint-{content_hash(inputs)}"
        if cell.train is None:
            return self._base(cell)
        return self.runs / runs.train_run_name(cell.train)

    def _base(self, cell: ResolvedCell) -> Path:
        inputs = source_fingerprint(cell.policy.source, cell.policy.revision)
        return self.runs / f"base-{content_hash(inputs)}"

    def drift_reference(self, cell: ResolvedCell) -> Path:
        """The file with the base's inputs and velocities under the cell's protocol."""
        digest = content_hash(runs.evaluation_inputs(cell))
        return self._base(cell) / "drift" / f"{digest}.safetensors"

    @_remembered
    def evaluation(self, cell: ResolvedCell) -> Path:
        """The evaluation folder of a cell, inside its run folder."""
        digest = content_hash(runs.evaluation_inputs(cell))
        return self.training(cell) / "evaluations" / f"{cell.evaluation.split}-{digest}"

    def credit(self, cell: ResolvedCell) -> Path:
        """The folder of a cell's credit measurement."""
        train = cell.train
        assert train is not None and cell.credit is not None
        credit = cell.credit.model_dump(mode="json")
        digest = content_hash({"train": runs.train_inputs(train), "credit": credit})
        name = f"credit-{train.method.name}-{'-'.join(train.rewards)}-seed{train.seed}"
        return self.runs / f"{name}-{digest}"

    def experiment(self, profile: str, experiment: str) -> Path:
        """The folder of an experiment's tables, figures and cells."""
        return cells_folder(self.tables, profile, experiment).parent
