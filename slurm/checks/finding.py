"""What a check says, and what a check of a cluster is given."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slurm.cluster import Cluster
from slurm.graph import Needs

Word = Literal["ok", "note", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        word: ``note`` is how things are, ``warning`` costs time or work, ``failed`` must be fixed.
        what: what was looked at.
        found: what is there, or what is wrong.
        fix: how to fix it; empty where nothing has to be.
        seconds: how long the check took, where that says something.
        memory: the most memory that it took, in bytes.
    """

    word: Word
    what: str
    found: str
    fix: str = ""
    seconds: float | None = None
    memory: int | None = None


def _silent(_line: str) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Case:
    """What is checked.

    Attributes:
        cluster: the cluster profile.
        wanted: the devices of each kind of stage.
        results: the folder that jobs write to; absolute.
        shares: jobs of the largest array.
        gpu_memory_gb: memory that each GPU must have.
        disk_gb: free space below which the results folder is too small.
        modules: what Python must import in a job.
        files: what must be there in a job; absolute paths.
        artifacts: published weights that must be cached there, by name.
        quick: submit no job.
        tell: called with a line before something that takes a while.
    """

    cluster: Cluster
    wanted: Mapping[str, Needs]
    results: Path
    shares: int = 1
    gpu_memory_gb: int = 0
    disk_gb: float = 1.0
    modules: tuple[str, ...] = ("g2rpo",)
    files: tuple[Path, ...] = ()
    artifacts: tuple[str, ...] = ()
    quick: bool = False
    tell: Callable[[str], None] = _silent

    @property
    def groups(self) -> dict[Needs, tuple[str, ...]]:
        """The kinds of stages that take the same devices."""
        found: dict[Needs, tuple[str, ...]] = {}
        for kind, needs in self.wanted.items():
            found[needs] = (*found.get(needs, ()), kind)
        return found

    @property
    def partitions(self) -> dict[str | None, tuple[str, ...]]:
        """The kinds of stages of each partition; None is the site's default."""
        found: dict[str | None, tuple[str, ...]] = {}
        for kind, needs in self.wanted.items():
            name = self.cluster.partition_of(needs)
            found[name] = (*found.get(name, ()), kind)
        return found


def listed(words: Iterable[str], most: int = 4) -> str:
    """Words with commas between them; of many, the first ones and how many more there are."""
    found = list(words)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def counted(number: int, word: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
