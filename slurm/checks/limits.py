"""What ``sbatch --test-only`` does not see: limits under which jobs wait for ever, lost work."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from g2rpo.config import nearest
from g2rpo.errors import UserError
from slurm.checks.finding import Case, Finding, listed
from slurm.checks.site import SECONDS, Site, number_of
from slurm.cluster import Cluster
from slurm.flags import KNOWN
from slurm.graph import Needs
from slurm.states import ask
from slurm.times import seconds_of

LOST = "it resumes from its last periodic checkpoint: up to checkpoints.every_minutes are lost"


def refuse_impossible(cluster: Cluster, wanted: Mapping[str, Needs], shares: int) -> None:
    """Refuses a profile under which stages could never run, before the first is submitted.

    Args:
        cluster: the profile.
        wanted: the devices of each kind of stage that is to run.
        shares: jobs of the largest array.

    Raises:
        UserError: the first reason, in one line.
    """
    if cluster.kind != "slurm" or not wanted:
        return
    case = Case(cluster, wanted, Path(), shares=shares)
    for needs in case.groups:
        cluster.tasks(needs)
    for finding in _findings(case):
        if finding.word == "failed":
            raise UserError(
                f"cluster {cluster.name}: {finding.what}: {finding.found}; {finding.fix}"
            )


def _findings(case: Case) -> Iterator[Finding]:
    yield from unknown_flags(case)
    try:
        site = Site.read()
    except UserError:
        return  # a plan needs no cluster; submitting says what is wrong with it
    yield from times(case, site)
    yield from jobs(case, site)


def unknown_flags(case: Case) -> Iterator[Finding]:
    """Flags in ``extra`` that sbatch does not know, plug-ins of the site included."""
    unknown = {name.replace("_", "-") for name in case.cluster.extra} - KNOWN
    if not unknown:
        return
    try:
        known = set(re.findall(r"--([a-z][a-z0-9-]*)", ask("sbatch", "--help", seconds=SECONDS)))
    except UserError:
        known = set()
    found = "sbatch has no such flag"
    if not known:
        found += " of its own, and is not here to list those of the site's plug-ins"
    for name in sorted(unknown - known):
        yield Finding("failed", f"extra: {name}", found, nearest(name, KNOWN | known))


def times(case: Case, site: Site) -> Iterator[Finding]:
    """Time limits: a job above the partition's or the qos's waits for ever."""
    lead = case.cluster.signal_lead_seconds
    good = True
    for name, kinds in case.partitions.items():
        asked = {kind: 60 * case.cluster.time_limit(kind) for kind in kinds}
        for what, most in _time_limits(case, site, name).items():
            long = [kind for kind, seconds in asked.items() if most is not None and seconds > most]
            if most is not None and long:
                good = False
                yield Finding(
                    "failed",
                    f"time of {listed(long, 8)}",
                    f"asks for {max(asked[kind] for kind in long) // 60} minutes, "
                    f"{what} allows {most // 60}",
                    f"set minutes: {{{', '.join(f'{kind}: {most // 60}' for kind in long)}}}; "
                    "jobs are requeued and resume",
                )
        tight = [kind for kind in asked if asked[kind] < 2 * lead]
        if tight:
            good = False
            yield Finding(
                "warning",
                f"time of {listed(tight, 8)}",
                f"more than half of it is left to save in (signal_lead_seconds: {lead})",
                f"raise minutes.{tight[0]} or lower signal_lead_seconds",
            )
    if good:
        minutes = ", ".join(f"{kind} {case.cluster.time_limit(kind)}" for kind in case.wanted)
        yield Finding("ok", "time limits", f"{minutes} minutes; signalled {lead} s before")


def _time_limits(case: Case, site: Site, partition: str | None) -> dict[str, int | None]:
    """The seconds that jobs of a partition may ask for, by who says so; None is no limit."""
    names = site.names(partition)
    rows = dict(_limiting_rows(case, site, names))
    limits = {what: seconds_of(row.get("MaxWall", "")) for what, row in rows.items()}
    if any("PartitionTimeLimit" in row.get("Flags", "") for row in rows.values()):
        return limits  # such a qos stands above the partition
    most = [seconds_of(site.partitions[part].get("MaxTime", "UNLIMITED")) for part in names]
    # A job that names several goes to one that takes it.
    known = [limit for limit in most if limit is not None]
    what = "partitions" if len(names) > 1 else "partition"
    shown = f"{what} {partition or ','.join(names)}"
    return {shown: max(known) if known and len(known) == len(most) else None} | limits


def _limiting_rows(
    case: Case, site: Site, partitions: Sequence[str] = ()
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The rows of accounting that limit this user's jobs, by what people call them.

    A qos counts where the profile names it, else the account's own; and that of the partition.
    """
    if site.accounts is None or not site.enforces("limits", "safe"):
        return
    account = case.cluster.account
    own = [row for row in site.accounts.associations if not row["Partition"]]
    if account is None and len(own) == 1:  # no other can be the default
        account = own[0]["Account"]
    accounts = [row for row in own if row["Account"] == account]
    named = [case.cluster.qos or row["DefaultQOS"] for row in accounts] or [case.cluster.qos or ""]
    # A job that may go to several partitions is bound by none of theirs alone.
    named += [site.partitions[part].get("QoS", "") for part in partitions if len(partitions) == 1]
    for qos in dict.fromkeys(named):
        if qos in site.accounts.qos:
            yield f"qos {qos}", site.accounts.qos[qos]
    for row in accounts:
        yield f"account {account}", row


def jobs(case: Case, site: Site) -> Iterator[Finding]:
    """Jobs and devices at once: beyond a user's limits they wait for ever."""
    fix = "lower hardware.evaluation_shares"
    for key in ("MaxArraySize", "MaxJobCount"):
        most = number_of(site.config.get(key))
        if most is not None and case.shares > 1 and case.shares >= most:
            found = f"{key} allows {most - 1} jobs, a cell is shared by {case.shares}"
            yield Finding("failed", "arrays", found, fix)
    for what, row in _limiting_rows(case, site):
        most = number_of(row.get("MaxSubmitPU") or row.get("MaxSubmit"))
        if most is not None and case.shares > most:
            found = f"{what} takes {most} of your jobs at once, a cell is shared by {case.shares}"
            yield Finding("failed", "jobs", found, fix)
        yield from _devices(case, what, row)


def _devices(case: Case, what: str, row: Mapping[str, str]) -> Iterator[Finding]:
    for needs, kinds in case.groups.items():
        try:
            tasks = case.cluster.tasks(needs) * case.cluster.nodes(needs)
        except UserError:
            continue  # sbatch's own line says so
        asked = {
            "gres/gpu": tasks if needs.gpus else 0,
            "cpu": tasks * case.cluster.cpus_per_task,
            "node": case.cluster.nodes(needs),
        }
        for key in ("MaxTRES", "MaxTRESPU", "GrpTRES"):
            for limit in (row.get(key) or "").split(","):
                name, _, text = limit.partition("=")
                most = number_of(text)
                if most is not None and asked.get(name, 0) > most:
                    found = f"{what} allows {most} of {name}, {listed(kinds, 8)} takes "
                    fix = "use another, or fewer ranks"
                    yield Finding("failed", f"{key} of {what}", f"{found}{asked[name]}", fix)


def accounting(_case: Case, site: Site) -> Iterator[Finding]:
    """Whether SLURM remembers how jobs ended."""
    if site.accounts is not None:
        storage = site.config["AccountingStorageType"].removeprefix("accounting_storage/")
        yield Finding("ok", "accounting", f"{storage} answers")
        return
    found = site.accounts_problem or "the cluster keeps no accounts"
    yield Finding(
        "warning",
        "accounting",
        f"{found}; how jobs ended is read from what they left on disk alone",
        "nothing: jobs run",
    )


def memory(case: Case, site: Site) -> Iterator[Finding]:
    """Memory by default: a job that asks for none may be given all of a node's."""
    if "MEMORY" not in site.config.get("SelectTypeParameters", "").upper():
        return
    for needs, kinds in case.groups.items():
        if not needs.gpus or case.cluster.memory_gb_per_task or needs.memory_gb:
            continue
        settings = [site.config, *(site.partitions[n] for n in site.names(case.cluster.partition))]
        keys = ("DefMemPerNode", "DefMemPerCPU")
        if not any(number_of(each.get(key)) for each in settings for key in keys):
            yield Finding(
                "warning",
                f"memory of {listed(kinds, 8)}",
                "a job that asks for none takes all of a node's, so no other runs beside it",
                "set memory_gb_per_task",
            )


def stopping(case: Case, site: Site) -> Iterator[Finding]:
    """What happens to a job that is stopped before its end: whether it can save, and resumes."""
    wait = seconds_of(site.config.get("KillWait", "")) or 0
    yield Finding(
        "ok",
        "requeueing",
        f"{case.cluster.max_restarts} times at most; a cancelled job has {wait} s to save",
    )
    kind = site.config.get("PreemptType", "").removeprefix("preempt/")
    for name in dict.fromkeys(part for each in case.partitions for part in site.names(each)):
        what = f"preemption in {name}"
        mode, grace = _preemption(case, site, kind, name)
        if kind in ("", "none", "(null)") or mode in ("OFF", ""):
            yield Finding("ok", what, "off")
        elif mode == "REQUEUE":
            yield _requeued(case, site, what, grace)
        elif mode == "CANCEL":
            yield Finding(
                "warning",
                what,
                "a preempted job is cancelled and not started again",
                "run the same command again, or name a partition or qos without preemption",
            )
        else:
            yield Finding("ok", what, f"{mode.lower()}: a job waits in memory and continues")


def _preemption(case: Case, site: Site, kind: str, partition: str) -> tuple[str, int]:
    """The mode of preemption of our jobs in a partition, and the seconds they have to save."""
    values = site.partitions[partition]
    common = site.config.get("PreemptMode", "OFF")
    mode, grace = values.get("PreemptMode") or common, number_of(values.get("GraceTime")) or 0
    if kind == "qos" and site.accounts is not None:
        qos = site.accounts.qos.get(case.cluster.qos or "normal", {})
        own = qos.get("PreemptMode") or "cluster"
        mode = common if own == "cluster" else own
        grace = seconds_of(qos.get("GraceTime", "")) or 0
    words = [word.strip().upper() for word in mode.split(",")]
    return next((word for word in words if word != "GANG"), "OFF"), grace


def _requeued(case: Case, site: Site, what: str, grace: int) -> Finding:
    lead = case.cluster.signal_lead_seconds
    option = "preempt_send_user_signal"
    if option not in site.config.get("SlurmctldParameters", "").lower():
        return Finding(
            "warning",
            what,
            f"a preempted job is requeued without being asked to save; {LOST}",
            f"the site: SlurmctldParameters={option} and a GraceTime; else lower "
            "checkpoints.every_minutes",
        )
    if grace < lead:
        return Finding(
            "warning",
            what,
            f"a preempted job has {grace} s (GraceTime) to save where signal_lead_seconds is "
            f"{lead}; where that is too short {LOST}",
            f"the site: GraceTime={lead}; or lower signal_lead_seconds to what saving takes",
        )
    return Finding("ok", what, f"a preempted job is asked to save, has {grace} s, and is requeued")
