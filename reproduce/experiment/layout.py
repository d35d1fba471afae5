"""Where everything of a cell is, by the hash of what it is made from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.evaluation.results import cells_folder
from g2rpo.config import content_hash
from g2rpo.provenance import source_fingerprint
from reproduce.experiment import ResolvedCell
from reproduce.experiment import fingerprint as runs


@dataclass(frozen=True)
class Layout:
    """Where things are written.

    Attributes:
        runs: training runs and evaluations, by the hash of what they are made from.
        tables: ``<profile>/<experiment>/`` with cells, tables and figures.
    """

    runs: Path
    tables: Path

    def training(self, cell: ResolvedCell) -> Path:
        """The training run folder of a cell; the base and a checkpoint have one of their own."""
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
        """The file of the base's inputs and velocities under the cell's protocol."""
        digest = content_hash(evaluation_inputs(cell))
        return self._base(cell) / "drift" / f"{digest}.safetensors"

    def evaluation(self, cell: ResolvedCell) -> Path:
        """The evaluation folder of a cell: inside of its training run."""
        digest = content_hash(evaluation_inputs(cell))
        return self.training(cell) / "evaluations" / f"{cell.evaluation.split}-{digest}"

    def credit(self, cell: ResolvedCell) -> Path:
        """The folder of what is measured of a cell's credit."""
        assert cell.train is not None and cell.credit is not None
        credit = cell.credit.model_dump(mode="json")
        inputs = {"train": runs.train_inputs(cell.train), "credit": credit}
        train = cell.train
        name = f"credit-{train.method.name}-{'-'.join(train.rewards)}-seed{train.seed}"
        return self.runs / f"{name}-{content_hash(inputs)}"

    def experiment(self, cell_profile: str, experiment: str) -> Path:
        """Where an experiment's tables, figures and cells go."""
        return cells_folder(self.tables, cell_profile, experiment).parent


@dataclass(frozen=True)
class RememberedLayout(Layout):
    """A layout for a short while in which no input changes: each cell's folders are named once.

    Naming one hashes the cell's whole configuration, and a plan asks a dozen times for each.
    """

    # By identity, which the cell that is kept with it makes unique.
    _found: dict[tuple[str, int], tuple[ResolvedCell, Path]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def training(self, cell: ResolvedCell) -> Path:
        """The training run folder of a cell."""
        return self._once("training", cell, super().training)

    def evaluation(self, cell: ResolvedCell) -> Path:
        """The evaluation folder of a cell."""
        return self._once("evaluation", cell, super().evaluation)

    def drift_reference(self, cell: ResolvedCell) -> Path:
        """The file of the base's inputs and velocities under the cell's protocol."""
        return self._once("drift", cell, super().drift_reference)

    def _once(self, what: str, cell: ResolvedCell, find: Callable[[ResolvedCell], Path]) -> Path:
        key = (what, id(cell))
        if key not in self._found:
            self._found[key] = cell, find(cell)
        return self._found[key][1]


def evaluation_inputs(cell: ResolvedCell) -> dict[str, Any]:
    """All that determines the held-out images of a trained policy."""
    return {
        "protocol": cell.evaluation.model_dump(mode="json", exclude={"name"}),
        "policy": runs.policy_inputs(cell.policy),
        "prompts": runs.prompts_hash(Path(cell.evaluation_prompts)),
        "algorithm_version": runs.ALGORITHM_VERSION,
    }


def protocol_hash(inputs: Mapping[str, Any]) -> str:
    """Names the protocol and the prompts of :func:`evaluation_inputs`, whatever the policy."""
    return content_hash({key: inputs[key] for key in ("protocol", "prompts")})
