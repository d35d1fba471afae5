"""The base class of stages: name, lease, completeness and work.

The modules of the stages import no model library before a stage runs: plans are made on login
nodes, and diffusers and transformers take many seconds to import.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from g2rpo.errors import UserError
from g2rpo.lease import Lease
from reproduce.experiment import Hardware, ResolvedCell
from reproduce.experiment.layout import Layout
from reproduce.runs.state import State, latest_attempt, state_of
from reproduce.stages.inputs import Inputs
from slurm import graph
from slurm.distributed import Ranks
from slurm.graph import Needs


@dataclass(frozen=True)
class Stage(ABC):
    """A unit of work of an experiment, done by one owner at a time."""

    layout: Layout

    kind: ClassVar[str]
    """The kind of stage, as shown to people and used in cluster profiles."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its unique name: the same for the same configuration and inputs."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Its name for people."""

    @property
    @abstractmethod
    def lease(self) -> Path:
        """The folder of its attempts."""

    @classmethod
    def devices(cls, hardware: Hardware) -> Needs:
        """The devices that stages of this kind need."""
        del hardware
        return Needs()

    @property
    def array(self) -> str | None:
        """The name of its array job; None for a separate job."""
        return None

    @property
    def payload(self) -> dict[str, Any]:
        """JSON that identifies it among the stages of its kind in a submission."""
        return {}

    @classmethod
    @abstractmethod
    def load(cls, inputs: Inputs, payload: Mapping[str, Any]) -> Self:
        """The stage of a submission that :attr:`payload` identifies."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether its outputs are complete."""

    @abstractmethod
    def run(self) -> None:
        """Does the remaining work; raises like :func:`perform`."""

    def finish(self) -> bool:
        """Combines the outputs of all shares once they are complete; returns whether they are."""
        return self.is_done()

    def state(self, since: float = 0.0, what: str = "it") -> State:
        """Its state, see :func:`reproduce.runs.state.state_of`."""
        attempt = latest_attempt(self.lease)
        return state_of(attempt, done=self.is_done(), what=what, since=since)

    def node(
        self, hardware: Hardware, needs: tuple[str, ...] = (), after: tuple[str, ...] = ()
    ) -> graph.Stage:
        """Its node in the submitted graph, with the devices of a profile."""
        return graph.Stage(
            name=self.name,
            kind=self.kind,
            label=self.label,
            payload=self.payload,
            needs=needs,
            after=after,
            resources=self.devices(hardware),
            array=self.array,
            # Joining thousands of Path objects takes a second.
            lease=os.path.join(os.getcwd(), self.lease),  # noqa: PTH109, PTH118
        )


@dataclass(frozen=True)
class CellStage(Stage):
    """A stage of one cell."""

    cell: ResolvedCell

    @property
    def label(self) -> str:
        return self.cell.label

    @property
    def payload(self) -> dict[str, Any]:
        return {"cell": f"{self.cell.name}.json"}

    @classmethod
    def load(cls, inputs: Inputs, payload: Mapping[str, Any]) -> Self:
        return cls(inputs.layout, inputs.cell(payload["cell"]))


def perform(stage: Stage, ranks: Ranks) -> None:
    """Runs ``stage`` under its lease on all ranks; returns at once if it is done.

    Raises:
        UserError: another process holds the lease for too long, or the stage fails.
        Stopped: the process was asked to stop; finished work is kept.
    """
    lease, message = None, None
    if ranks.first and not stage.is_done():
        try:
            lease = Lease.acquire(stage.lease.parent, stage.lease.name)
        except UserError as error:
            message = str(error)
        if lease is not None and stage.is_done():  # finished by the previous owner
            lease.release("done")
            lease = None
    decision = ranks.agree("run" if lease is not None else message)
    if decision is None:
        return
    if decision != "run":
        raise UserError(decision)
    with lease or nullcontext():
        stage.run()
