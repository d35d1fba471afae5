"""Limits that ``sbatch --test-only`` does not report: jobs that would wait forever, lost work."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from g2rpo.errors import UserError
from slurm.checks.finding import Case, Finding, listed
from slurm.cluster import Cluster
from slurm.graph import Needs
from slurm.states import ask
from slurm.times import seconds_of

SECONDS = 20
"""Time limit of a command: without a controller, SLURM itself waits for several minutes."""
_KEY = re.compile(r"(?:^|\s)([A-Za-z][\w:/]*)=")
_QOS = ("Name", "MaxWall", "Flags", "PreemptMode", "GraceTime")


def fields(line: str) -> dict[str, str]:
    """The values of a line ``Key=value Key=value``; values may contain spaces."""
    keys = list(_KEY.finditer(line))
    ends = [key.start() for key in keys[1:]] + [len(line)]
    return {key[1]: line[key.end() : end].strip() for key, end in zip(keys, ends, strict=True)}


def _number(text: str | None) -> int | None:
    match = re.match(r"\d+", (text or "").strip())
    return int(match[0]) if match else None


@dataclass(frozen=True)
class Site:
    """A cluster as SLURM describes it.

    Attributes:
        config: ``scontrol show config``.
        partitions: ``scontrol show partition``, by name.
        qos: ``sacctmgr show qos``, by name; empty without accounting.
    """

    config: Mapping[str, str]
    partitions: Mapping[str, Mapping[str, str]]
    qos: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls) -> "Site":
        """Asks SLURM.

        Raises:
            UserError: SLURM does not answer.
        """
        lines = ask("scontrol", "show", "config", seconds=SECONDS).splitlines()
        pairs = (line.partition("=") for line in lines)
        config = {name.strip(): value.strip() for name, sign, value in pairs if sign}
        text = ask("scontrol", "show", "partition", "--oneliner", seconds=SECONDS)
        partitions = [row for row in map(fields, text.splitlines()) if "PartitionName" in row]
        try:
            shown = ("--noheader", "--parsable2", "show", "qos", f"format={','.join(_QOS)}")
            rows = [
                line.split("|") for line in ask("sacctmgr", *shown, seconds=SECONDS).splitlines()
            ]
        except UserError:
            rows = []
        qos = [dict(zip(_QOS, row, strict=True)) for row in rows if len(row) == len(_QOS)]
        return cls(
            config,
            {row["PartitionName"]: row for row in partitions},
            {row["Name"]: row for row in qos},
        )

    def names(self, partition: str | None) -> list[str]:
        """The existing partitions that a profile's ``partition`` names."""
        default = (n for n, each in self.partitions.items() if each.get("Default") == "YES")
        wanted = partition or next(default, "")
        return [name for name in wanted.split(",") if name in self.partitions]


def refuse_impossible(cluster: Cluster, wanted: Mapping[str, Needs], shares: int) -> None:
    """Rejects a profile whose stages could never run, before anything is submitted.

    ``shares`` is the number of jobs in the largest array.

    Raises:
        UserError: the first reason, in one line.
    """
    if cluster.kind != "slurm" or not wanted:
        return
    case = Case(cluster, wanted, Path(), shares=shares)
    for needs in case.groups:
        cluster.tasks(needs)
    try:
        site = Site.read()
    except UserError:
        return  # a plan needs no cluster; submitting reports this
    for finding in (*times(case, site), *arrays(case, site)):
        if finding.word == "failed":
            raise UserError(
                f"cluster {cluster.name}: {finding.what}: {finding.found}; {finding.fix}"
            )


def times(case: Case, site: Site) -> Iterator[Finding]:
    """Time limits: SLURM accepts a job above the limit of its partition, and never starts it."""
    lead, cluster = case.cluster.signal_lead_seconds, case.cluster
    good = True
    for name, kinds in case.partitions.items():
        asked = {kind: cluster.time_limit(kind) for kind in kinds}
        for what, most in _time_limits(site, name, cluster.qos):
            long = [kind for kind, minutes in asked.items() if 60 * minutes > most]
            if long:
                good = False
                yield Finding(
                    "failed",
                    f"time of {listed(long, 8)}",
                    f"asks for {max(asked[kind] for kind in long)} minutes, {what} allows "
                    f"{most // 60}",
                    f"set minutes: {{{', '.join(f'{kind}: {most // 60}' for kind in long)}}}; "
                    "jobs are requeued and resume",
                )
        tight = [kind for kind, minutes in asked.items() if 60 * minutes < 2 * lead]
        if tight:
            good = False
            yield Finding(
                "warning",
                f"time of {listed(tight, 8)}",
                f"more than half of it is reserved for saving (signal_lead_seconds: {lead})",
                f"raise minutes.{tight[0]} or lower signal_lead_seconds",
            )
    if good:
        minutes = ", ".join(f"{kind} {cluster.time_limit(kind)}" for kind in case.wanted)
        yield Finding("ok", "time limits", f"{minutes} minutes; signalled {lead} s before")


def _time_limits(site: Site, partition: str | None, qos: str | None) -> Iterator[tuple[str, int]]:
    """The time limits of a partition's jobs in seconds, and what sets them."""
    names = site.names(partition)
    named = [qos or "", *(site.partitions[n].get("QoS", "") for n in names if len(names) == 1)]
    rows = {name: site.qos[name] for name in named if name in site.qos}
    enforced = site.config.get("AccountingStorageEnforce", "").lower()
    if not re.search("limits|safe|all", enforced):
        rows = {}
    for name, row in rows.items():
        if (seconds := seconds_of(row["MaxWall"])) is not None:
            yield f"qos {name}", seconds
    if any("PartitionTimeLimit" in row["Flags"] for row in rows.values()):
        return  # such a qos overrides the partition
    # A job that names several partitions runs in any that accepts it.
    limits = [seconds_of(site.partitions[name].get("MaxTime", "")) for name in names]
    known = [limit for limit in limits if limit is not None]
    if known and len(known) == len(limits):
        yield f"partition {partition or names[0]}", max(known)


def arrays(case: Case, site: Site) -> Iterator[Finding]:
    """The site's limits on the size of an array."""
    for key in ("MaxArraySize", "MaxJobCount"):
        most = _number(site.config.get(key))
        if most is not None and 1 < case.shares >= most:
            found = f"{key} allows {most - 1} jobs, a cell has {case.shares} shares"
            yield Finding("failed", "arrays", found, "lower hardware.evaluation_shares")


def memory(case: Case, site: Site) -> Iterator[Finding]:
    """Default memory: a job that requests none may get all of a node's."""
    if "MEMORY" not in site.config.get("SelectTypeParameters", "").upper():
        return
    settings = [site.config, *(site.partitions[n] for n in site.names(case.cluster.partition))]
    keys = ("DefMemPerNode", "DefMemPerCPU")
    if any(_number(each.get(key)) for each in settings for key in keys):
        return
    kinds = [
        kind
        for kind, needs in case.wanted.items()
        if needs.gpus and case.cluster.memory_gb(needs) is None
    ]
    if kinds:
        yield Finding(
            "warning",
            f"memory of {listed(kinds, 8)}",
            "a job that requests none gets all of a node's, so nothing else runs beside it",
            "set memory_gb_per_task",
        )


def preemption(case: Case, site: Site) -> Iterator[Finding]:
    """Whether a preempted job can save, and is requeued."""
    kind = site.config.get("PreemptType", "").removeprefix("preempt/")
    lead, signal = case.cluster.signal_lead_seconds, "preempt_send_user_signal"
    qos = site.qos.get(case.cluster.qos or "normal", {}) if kind == "qos" else {}
    for name in dict.fromkeys(part for each in case.partitions for part in site.names(each)):
        row, what = qos or site.partitions[name], f"preemption in {name}"
        mode = row.get("PreemptMode", "cluster")
        mode = (site.config.get("PreemptMode", "OFF") if mode == "cluster" else mode).upper()
        grace = seconds_of(row.get("GraceTime", "")) or 0
        found = fix = ""
        if kind in ("", "none", "(null)") or mode in ("OFF", "GANG"):
            yield Finding("ok", what, "off")
            continue
        if "CANCEL" in mode:
            found = "preempted jobs are cancelled and not restarted"
            fix = "run the same command again, or use a partition or qos without preemption"
        elif "REQUEUE" in mode and signal not in site.config.get("SlurmctldParameters", "").lower():
            found = "preempted jobs lose the work since their last checkpoint: no signal to save"
            fix = f"administrator: set {signal} and GraceTime; or lower checkpoints.every_minutes"
        elif "REQUEUE" in mode and grace < lead:
            found = (
                f"preempted jobs have {grace} s (GraceTime) to save, signal_lead_seconds: {lead}"
            )
            fix = f"administrator: set GraceTime={lead}; or lower signal_lead_seconds"
        elif "SUSPEND" in mode:
            found = "preempted jobs are suspended and continue later"
        found = found or f"{mode.lower()}, {grace} s to save"
        yield Finding("warning" if fix else "ok", what, found, fix)
