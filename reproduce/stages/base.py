"""What all stages have in common: a name, a lease, whether they are done, and their work.

Nothing here or in the modules of the stages imports a model library before a stage runs: what is
done is asked on login nodes, and diffusers and transformers take many seconds to import.
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
    """A piece of an experiment that is done whole, by one owner at a time.

    Attributes:
        layout: where things are.
    """

    layout: Layout

    kind: ClassVar[str]
    """What sort of stage it is, in one word for people and cluster profiles."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Names what it makes: the same for the same configuration and inputs."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What people call it."""

    @property
    @abstractmethod
    def lease(self) -> Path:
        """The folder of its attempts."""

    @classmethod
    def devices(cls, hardware: Hardware) -> Needs:
        """What a stage of its kind runs on."""
        del hardware
        return Needs()

    @property
    def array(self) -> str | None:
        """Stages of one array job have the same; None for a job of its own."""
        return None

    @property
    def payload(self) -> dict[str, Any]:
        """What tells it from others of its kind in a submission; JSON."""
        return {}

    @classmethod
    @abstractmethod
    def load(cls, inputs: Inputs, payload: Mapping[str, Any]) -> Self:
        """The stage of a submission that :attr:`payload` told."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether nothing is left to do."""

    @abstractmethod
    def run(self) -> None:
        """Does what is left; raises as :func:`perform` does."""

    def finish(self) -> bool:
        """Does what is left when all stages of its kind are done; returns whether they are."""
        return self.is_done()

    def state(self, since: float = 0.0, what: str = "it") -> State:
        """Where it stands, see :func:`reproduce.runs.state.state_of`."""
        attempt = latest_attempt(self.lease)
        return state_of(attempt, done=self.is_done(), what=what, since=since)

    def node(
        self, hardware: Hardware, needs: tuple[str, ...] = (), after: tuple[str, ...] = ()
    ) -> graph.Stage:
        """The stage in the graph that is submitted, on the devices of a profile."""
        return graph.Stage(
            name=self.name,
            kind=self.kind,
            label=self.label,
            payload=self.payload,
            needs=needs,
            after=after,
            resources=self.devices(hardware),
            array=self.array,
            # Joined as text: thousands of paths take a second.
            lease=os.path.join(os.getcwd(), self.lease),  # noqa: PTH109, PTH118
        )


@dataclass(frozen=True)
class CellStage(Stage):
    """A stage of one cell.

    Attributes:
        cell: the cell.
    """

    cell: ResolvedCell

    @property
    def label(self) -> str:
        """What people call it."""
        return self.cell.label

    @property
    def payload(self) -> dict[str, Any]:
        """The file of its cell."""
        return {"cell": f"{self.cell.name}.json"}

    @classmethod
    def load(cls, inputs: Inputs, payload: Mapping[str, Any]) -> Self:
        """The stage of a cell of a submission."""
        return cls(inputs.layout, inputs.cell(payload["cell"]))


def perform(stage: Stage, ranks: Ranks) -> None:
    """Runs ``stage`` under its lease, on all ranks; returns at once where it is done.

    Raises:
        UserError: another process has the lease and keeps it too long, or the stage fails.
        Stopped: the process was asked to stop; what is done is kept.
    """
    lease, message = None, None
    if ranks.first and not stage.is_done():
        try:
            lease = Lease.acquire(stage.lease.parent, stage.lease.name)
        except UserError as error:
            message = str(error)
        if lease is not None and stage.is_done():  # the owner that was waited for has finished it
            lease.release("done")
            lease = None
    decision = ranks.agree("run" if lease is not None else message)
    if decision is None:
        return
    if decision != "run":
        raise UserError(decision)
    with lease or nullcontext():
        stage.run()
