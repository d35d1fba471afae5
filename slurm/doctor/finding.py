"""What an examination says, and what it is asked."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from slurm.cluster import Cluster
from slurm.graph import Needs

Word = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One line of an examination.

    Attributes:
        word: ``failed`` keeps jobs from running, ``warning`` costs time or work.
        what: what was looked at.
        found: what was found.
        mend: how to mend it; empty where there is nothing to mend.
    """

    word: Word
    what: str
    found: str
    mend: str = ""


def _silent(_line: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Options:
    """What else an examination looks for.

    Attributes:
        shares: jobs of the largest array.
        gpu_memory_gb: memory that each GPU must have.
        disk_gb: free space below which the results folder is too small.
        modules: what Python must import in a job.
        files: what must be there in a job; absolute paths.
        artifacts: published weights that must be cached there, by name.
        quick: submit no job.
        tell: called with a line before something that takes a while.
    """

    shares: int = 1
    gpu_memory_gb: int = 0
    disk_gb: float = 1.0
    modules: tuple[str, ...] = ("g2rpo",)
    files: tuple[Path, ...] = ()
    artifacts: tuple[str, ...] = ()
    quick: bool = False
    tell: Callable[[str], None] = _silent


@dataclass(frozen=True)
class Case:
    """What is examined.

    Attributes:
        cluster: the cluster profile.
        wanted: the devices of each kind of stage.
        results: the folder that jobs write to; absolute.
        options: what else is looked for.
    """

    cluster: Cluster
    wanted: Mapping[str, Needs]
    results: Path
    options: Options = field(default_factory=Options)

    @property
    def groups(self) -> dict[Needs, tuple[str, ...]]:
        """The kinds of stages that take the same devices."""
        found: dict[Needs, tuple[str, ...]] = {}
        for kind, needs in self.wanted.items():
            found[needs] = (*found.get(needs, ()), kind)
        return found

    def partition(self, needs: Needs) -> str | None:
        """The partition of a stage as the profile names it; None is the site's default."""
        if needs.gpus:
            return self.cluster.partition
        return self.cluster.cpu_partition or self.cluster.partition

    @property
    def partitions(self) -> dict[str | None, tuple[str, ...]]:
        """The kinds of stages of each partition."""
        found: dict[str | None, tuple[str, ...]] = {}
        for kind, needs in self.wanted.items():
            name = self.partition(needs)
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
