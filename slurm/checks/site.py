"""The cluster as SLURM describes it: configuration, partitions, nodes, what accounting allows."""

import getpass
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from g2rpo.errors import UserError
from slurm.states import ask

SECONDS = 20
"""How long a command may take; SLURM's own patience without a controller is several minutes."""
_KEY = re.compile(r"(?:^|\s)([A-Za-z][\w:/]*)=")
_UNUSABLE = re.compile(r"^down|drain|fail|error|future|inval|unknown|no_respond|reboot")
_ASSOCIATION = (
    "Account", "Partition", "QOS", "DefaultQOS", "MaxJobs", "MaxSubmit", "MaxWall", "MaxTRES",
    "GrpTRES",
)  # fmt: skip
_QOS = (
    "Name", "GraceTime", "PreemptMode", "MaxWall", "MaxTRESPU", "MaxTRES", "MaxJobsPU",
    "MaxSubmitPU", "GrpTRES", "Flags",
)  # fmt: skip


def fields(line: str) -> dict[str, str]:
    """The values of a line ``Key=value Key=value``; values may hold spaces."""
    keys = list(_KEY.finditer(line))
    ends = [key.start() for key in keys[1:]] + [len(line)]
    return {key[1]: line[key.end() : end].strip() for key, end in zip(keys, ends, strict=True)}


def number_of(text: str | None) -> int | None:
    """A whole number; None where there is no limit."""
    found = re.match(r"\d+", (text or "").strip())
    return int(found[0]) if found else None


@dataclass(frozen=True)
class Node:
    """One node, in sinfo's words: ``idle``, ``drained``, ``idle*`` (it does not answer)."""

    name: str
    state: str
    gpus: str
    cpus: str
    memory_mb: str
    features: str
    reason: str

    def usable(self, *, reserved: bool) -> bool:
        """Whether jobs can start there now or once others end.

        Args:
            reserved: whether nodes that are set aside by a reservation count.
        """
        if "*" in self.state or _UNUSABLE.search(self.state.rstrip("~#!%$@^-")):
            return False
        return reserved or not re.match("reserved|maint", self.state)

    @property
    def trouble(self) -> str:
        """Its name and why it cannot be used."""
        return f"{self.name} ({self.state}{'' if self.reason == 'none' else f': {self.reason}'})"

    @property
    def shape(self) -> str:
        """What it has, e.g. ``gpu:2, 4 CPUs, 8 GB``."""
        parts = [re.sub(r"\([^)]*\)", "", self.gpus), f"{self.cpus} CPUs"]
        parts += [f"{(number_of(self.memory_mb) or 0) / 1024:.0f} GB", self.features]
        return ", ".join(part for part in parts if part and part != "(null)")


@dataclass(frozen=True)
class Accounts:
    """What accounting knows: this user's associations and the site's qos, with their limits."""

    associations: tuple[Mapping[str, str], ...]
    qos: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Site:
    """A cluster.

    Attributes:
        config: ``scontrol show config``.
        partitions: what ``scontrol show partition`` tells, by name.
        accounts: None where accounting is not there or does not answer.
        accounts_problem: why not.
    """

    config: Mapping[str, str]
    partitions: Mapping[str, Mapping[str, str]]
    accounts: Accounts | None = None
    accounts_problem: str = ""

    @classmethod
    def read(cls) -> "Site":
        """Asks SLURM.

        Raises:
            UserError: it does not answer.
        """
        pairs = (line.partition("=") for line in _ask("scontrol", "show", "config").splitlines())
        config = {name.strip(): value.strip() for name, sign, value in pairs if sign}
        rows = map(fields, _ask("scontrol", "show", "partition", "--oneliner").splitlines())
        partitions = {row["PartitionName"]: row for row in rows if "PartitionName" in row}
        accounts, problem = None, ""
        try:
            accounts = _read_accounts(config)
        except UserError as error:
            problem = str(error)
        return cls(config, partitions, accounts, problem)

    def names(self, partition: str | None) -> list[str]:
        """The partitions that a profile's ``partition`` stands for, those that exist."""
        default = (n for n, each in self.partitions.items() if each.get("Default") == "YES")
        wanted = partition or next(default, "")
        return [name for name in wanted.split(",") if name in self.partitions]

    def nodes_of(self, partition: str | None) -> list[Node]:
        """The nodes of those partitions.

        Raises:
            UserError: SLURM does not answer.
        """
        names = self.names(partition)
        if not names:
            return []
        shown = ("sinfo", "--noheader", "--Node", "--format=%N|%T|%G|%c|%m|%f|%E")
        rows = [line.split("|", 6) for line in _ask(*shown, f"-p{','.join(names)}").splitlines()]
        found = {row[0]: Node(*map(str.strip, row)) for row in rows if len(row) == 7}
        return list(found.values())

    def enforces(self, *what: str) -> bool:
        """Whether accounting refuses or holds jobs for one of these."""
        enforced = self.config.get("AccountingStorageEnforce", "none").lower().split(",")
        return any(each in enforced for each in (*what, "all"))


def _ask(*command: str) -> str:
    return ask(*command, seconds=SECONDS)


def _rows(text: str, names: tuple[str, ...]) -> Iterator[dict[str, str]]:
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) == len(names):
            yield dict(zip(names, parts, strict=True))


def _read_accounts(config: Mapping[str, str]) -> Accounts | None:
    """Raises UserError where accounting should answer and does not."""
    storage = config.get("AccountingStorageType", "")
    if storage in ("", "(null)", "accounting_storage/none"):
        return None
    _ask("sacct", "--allocations", "--noheader", "--jobs=1")
    show = ("sacctmgr", "--noheader", "--parsable2", "show")
    own = (f"user={getpass.getuser()}", f"cluster={config.get('ClusterName', '')}")
    text = _ask(*show, "association", *own, f"format={','.join(_ASSOCIATION)}")
    qos = _rows(_ask(*show, "qos", f"format={','.join(_QOS)}"), _QOS)
    return Accounts(tuple(_rows(text, _ASSOCIATION)), {row["Name"]: row for row in qos})
