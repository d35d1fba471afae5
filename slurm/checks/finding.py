"""The input and the output of checks: cases, questions to a process, findings."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from g2rpo.config import StrictModel
from slurm.cluster import Cluster
from slurm.graph import Needs

Word = Literal["ok", "note", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        word: ``note`` is information, ``warning`` costs time or work, ``failed`` must be fixed.
        what: what was checked.
        found: the result, or what is wrong.
        fix: how to fix it; empty if there is nothing to fix.
        seconds: how long the check took, if that is informative.
        memory: peak memory of the check, in bytes.
    """

    word: Word
    what: str
    found: str
    fix: str = ""
    seconds: float | None = None
    memory: int | None = None


class Question(StrictModel):
    """What a process must find where it runs.

    Attributes:
        modules: Python modules to import.
        files: absolute paths of files that must exist.
        artifacts: published weights that must be cached, by name.
        gpus: how many GPUs the process must see.
        gpu_memory_gb: required memory of each GPU.
        disk_gb: free space, in GB, below which there is a warning.
        several: whether stages have several ranks, which must reach each other; None skips this.
    """

    modules: tuple[str, ...] = ("g2rpo",)
    files: tuple[str, ...] = ()
    artifacts: tuple[str, ...] = ()
    gpus: int = 0
    gpu_memory_gb: int = 0
    disk_gb: float = 1.0
    several: bool | None = None


def _silent(_line: str) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Case:
    """What is checked.

    Attributes:
        cluster: the cluster profile.
        wanted: the devices of each kind of stage.
        results: the folder that jobs write to.
        shares: jobs of the largest array.
        question: what a job must find on its node.
        quick: submit no job.
        tell: called with a progress message before slow checks.
    """

    cluster: Cluster
    wanted: Mapping[str, Needs]
    results: Path
    shares: int = 1
    question: Question = field(default_factory=Question)
    quick: bool = False
    tell: Callable[[str], None] = _silent

    @property
    def groups(self) -> dict[Needs, tuple[str, ...]]:
        """The kinds of stages by the devices they need."""
        groups: dict[Needs, tuple[str, ...]] = {}
        for kind, needs in self.wanted.items():
            groups[needs] = (*groups.get(needs, ()), kind)
        return groups

    @property
    def partitions(self) -> dict[str | None, tuple[str, ...]]:
        """The kinds of stages by partition; None is the site's default."""
        partitions: dict[str | None, tuple[str, ...]] = {}
        for kind, needs in self.wanted.items():
            name = self.cluster.partition_of(needs)
            partitions[name] = (*partitions.get(name, ()), kind)
        return partitions


def listed(words: Iterable[str], most: int = 4) -> str:
    """Words separated by commas; of many, the first ones and the number of others."""
    words = list(words)
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
