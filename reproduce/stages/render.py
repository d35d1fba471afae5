"""The last stage: writes the table of the finished cells, with gaps for the others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reproduce.experiment import Experiment, Profile, ResolvedCell
from reproduce.runs.state import State, latest_attempt, state_of
from reproduce.stages.base import Stage
from reproduce.stages.cells import finish_cells
from reproduce.stages.inputs import Inputs
from reproduce.tables.notes import Gap


@dataclass(frozen=True)
class Render(Stage):
    """Writes and prints the table, and writes the figures."""

    experiment: Experiment
    profile: Profile
    cells: tuple[ResolvedCell, ...]
    gaps: list[Gap] = field(default_factory=list, compare=False)
    """Cells without a result in the last run."""
    kind = "render"

    @property
    def name(self) -> str:
        """A name for the table, whatever its cells."""
        return f"render/{self.profile.name}/{self.experiment.name}"

    @property
    def label(self) -> str:
        return self.experiment.table.title

    @property
    def lease(self) -> Path:
        folder = self.layout.experiment(self.profile.name, self.experiment.name)
        return folder.resolve() / "leases" / "render"

    @classmethod
    def load(cls, inputs: Inputs, payload: Mapping[str, Any]) -> "Render":
        del payload
        cells = tuple(inputs.cells())
        return cls(inputs.layout, inputs.experiment, inputs.profile, cells)

    def is_done(self) -> bool:
        """Never: the table depends on when it is rendered."""
        return False

    def state(self, since: float = 0.0, what: str = "it") -> State:
        """Its state: done if it was rendered after ``since``."""
        attempt = latest_attempt(self.lease)
        record = None if attempt is None else attempt.record
        done = record is not None and record.state == "done" and record.updated >= since
        return state_of(attempt, done=done, what=what, since=since)

    def run(self) -> None:
        from reproduce.tables.publish import publish_cells  # slow: matplotlib

        finished, self.gaps[:] = finish_cells(self.cells, self.layout)
        publish_cells(self.experiment, self.profile, finished, self.gaps, self.layout)
