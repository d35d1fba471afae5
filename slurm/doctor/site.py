"""The cluster as SLURM describes it: configuration, partitions, nodes, what accounting allows."""

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from g2rpo.errors import UserError

SECONDS = 20
"""How long a command may take; SLURM's own patience without a controller is several minutes."""
_KEY = re.compile(r"(?:^|\s)([A-Za-z][\w:/]*)=")
_UNUSABLE = {
    "DOWN", "DRAIN", "DRAINED", "DRAINING", "ERROR", "FAIL", "FAILING", "FUTURE", "INVAL",
    "INVALID_REG", "NOT_RESPONDING", "NO_RESPOND", "UNKNOWN",
}  # fmt: skip
_SET_ASIDE = {"MAINT", "RESERVED"}
_ASSOCIATION = ("Account", "Partition", "QOS", "DefaultQOS", "MaxJobs", "MaxSubmit", "MaxWall")
_ASSOCIATION_TRES = ("MaxTRES", "GrpTRES")
_QOS = ("Name", "GraceTime", "PreemptMode", "MaxWall", "MaxTRESPU", "MaxTRES", "MaxJobsPU")
_QOS_MORE = ("MaxSubmitPU", "GrpTRES", "Flags")


def ask(*command: str, text: str = "", seconds: float = SECONDS) -> str:
    """What a command answers.

    Raises:
        UserError: it is missing, fails, or does not answer in time.
    """
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env=os.environ | {"SLURM_TIME_FORMAT": "standard"},
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} was not found") from None
    except PermissionError:
        raise UserError(f"{command[0]} may not be run") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {seconds:.0f} s") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
        told = next((line for line in reversed(lines) if line), "")
        told = re.sub(r"^\w+: (fatal: |error: )?", "", told)
        raise UserError(f"{command[0]}: {told[:300] or f'ended with code {done.returncode}'}")
    # sbatch --test-only answers on standard error.
    return done.stdout or done.stderr


def missing(*commands: str) -> list[str]:
    """Those commands that are not on the search path."""
    return [command for command in commands if shutil.which(command) is None]


def fields(line: str) -> dict[str, str]:
    """The values of a line ``Key=value Key=value``; values may hold spaces."""
    keys = list(_KEY.finditer(line))
    ends = [key.start() for key in keys[1:]] + [len(line)]
    return {key[1]: line[key.end() : end].strip() for key, end in zip(keys, ends, strict=True)}


def settings(text: str) -> dict[str, str]:
    """The values of ``scontrol show config``."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {name.strip(): value.strip() for name, sign, value in pairs if sign}


def number_of(text: str | None) -> int | None:
    """A whole number; None where there is no limit."""
    found = re.match(r"\d+", (text or "").strip())
    return int(found[0]) if found else None


def resources(text: str | None) -> dict[str, str]:
    """``cpu=8,gres/gpu=4`` by name."""
    parts = (part.partition("=") for part in (text or "").split(","))
    return {name: value for name, sign, value in parts if sign}


def gpus_of(gres: str) -> dict[str, int]:
    """GPUs by type (empty where it has none) in a node's ``Gres``, e.g. ``gpu:a100:8(S:0-1)``."""
    found: dict[str, int] = {}
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = part.strip().split(":")
        if name != "gpu":
            continue
        count = rest.pop() if rest and rest[-1].isdigit() else "1"
        kind = rest[0] if rest else ""
        found[kind] = found.get(kind, 0) + int(count)
    return found


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        name: its name.
        values: what ``scontrol show node`` tells of it.
    """

    name: str
    values: Mapping[str, str]

    @property
    def partitions(self) -> set[str]:
        """The partitions that it is in."""
        return set(self.values.get("Partitions", "").split(","))

    @property
    def state(self) -> str:
        """SLURM's words, e.g. ``IDLE+DRAIN``; a star: it does not answer."""
        return self.values.get("State", "UNKNOWN")

    @property
    def reason(self) -> str:
        """Why it is not in use, where somebody has said so."""
        return re.sub(r"\s*\[[^]]*\]$", "", self.values.get("Reason", ""))

    def usable(self, *, reserved: bool) -> bool:
        """Whether jobs can start there now or once others end.

        Args:
            reserved: whether nodes that are set aside by a reservation count.
        """
        words = set(self.state.rstrip("*~#!%$@^-").split("+"))
        if "*" in self.state or words & _UNUSABLE:
            return False
        return reserved or not words & _SET_ASIDE

    @property
    def gpus(self) -> dict[str, int]:
        """Its GPUs by type."""
        return gpus_of(self.values.get("Gres", ""))

    @property
    def cpus(self) -> int:
        """CPUs that jobs can have."""
        return number_of(self.values.get("CPUEfctv") or self.values.get("CPUTot")) or 0

    @property
    def memory_mb(self) -> int:
        """Main memory that jobs can have."""
        kept = number_of(self.values.get("MemSpecLimit")) or 0
        return (number_of(self.values.get("RealMemory")) or 0) - kept

    @property
    def features(self) -> set[str]:
        """What ``--constraint`` can ask for."""
        named = self.values.get("AvailableFeatures", "")
        return set() if named in ("", "(null)") else set(named.split(","))


@dataclass(frozen=True)
class Accounts:
    """What accounting knows of this user.

    Attributes:
        associations: the accounts that the user may charge, with their limits.
        qos: the site's qualities of service by name, with their limits.
    """

    associations: tuple[Mapping[str, str], ...]
    qos: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Site:
    """A cluster.

    Attributes:
        config: ``scontrol show config``.
        partitions: what ``scontrol show partition`` tells, by name.
        nodes: all nodes.
        accounts: None where accounting is not there or does not answer.
        accounts_problem: why not.
    """

    config: Mapping[str, str]
    partitions: Mapping[str, Mapping[str, str]]
    nodes: tuple[Node, ...]
    accounts: Accounts | None = None
    accounts_problem: str = ""

    @classmethod
    def read(cls, *, with_nodes: bool = True) -> "Site":
        """Asks SLURM; on a large cluster the nodes take it longest.

        Raises:
            UserError: it does not answer.
        """
        config = settings(ask("scontrol", "show", "config"))
        partitions = _named(ask("scontrol", "show", "partition", "--oneliner"), "PartitionName")
        told = ask("scontrol", "show", "node", "--oneliner") if with_nodes else ""
        nodes = _named(told, "NodeName")
        listing = tuple(Node(name, values) for name, values in nodes.items())
        accounts, problem = None, ""
        try:
            accounts = _read_accounts(config)
        except UserError as error:
            problem = str(error)
        return cls(config, partitions, listing, accounts, problem)

    @cached_property
    def default(self) -> str | None:
        """The partition of jobs that name none."""
        marked = (name for name, each in self.partitions.items() if each.get("Default") == "YES")
        return next(marked, None)

    def names(self, partition: str | None) -> list[str]:
        """The partitions that a profile's ``partition`` stands for, those that exist."""
        wanted = partition or self.default or ""
        return [name for name in wanted.split(",") if name in self.partitions]

    def nodes_of(self, partition: str | None) -> list[Node]:
        """The nodes of those partitions."""
        names = set(self.names(partition))
        return [node for node in self.nodes if node.partitions & names]

    def has_option(self, setting: str, option: str) -> bool:
        """Whether a comma-separated setting has an option, in whatever case."""
        options = self.config.get(setting, "").lower().split(",")
        return option.lower() in (each.partition("=")[0].strip() for each in options)


def _named(text: str, key: str) -> dict[str, dict[str, str]]:
    found = (fields(line) for line in text.splitlines())
    return {each[key]: each for each in found if key in each}


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
    ask("sacct", "--allocations", "--noheader", "--jobs=1")
    names = (*_ASSOCIATION, *_ASSOCIATION_TRES)
    text = ask(
        "sacctmgr", "--noheader", "--parsable2", "show", "association",
        f"user={getpass.getuser()}", f"cluster={config.get('ClusterName', '')}",
        f"format={','.join(names)}",
    )  # fmt: skip
    qos_names = (*_QOS, *_QOS_MORE)
    qos = ask(
        "sacctmgr", "--noheader", "--parsable2", "show", "qos", f"format={','.join(qos_names)}"
    )
    by_name = {row["Name"]: row for row in _rows(qos, qos_names)}
    return Accounts(tuple(_rows(text, names)), by_name)
