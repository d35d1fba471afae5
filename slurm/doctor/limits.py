"""What the site allows: time, jobs at once, accounts, qualities of service."""

import os
from collections.abc import Iterator, Mapping, Sequence

from g2rpo.config import nearest
from g2rpo.errors import UserError
from slurm.doctor.finding import Case, Finding, Word, listed
from slurm.doctor.nodes import Request
from slurm.doctor.site import Site, number_of, resources
from slurm.times import seconds_of

_WITHOUT = "without it ended jobs are told from what they left on disk alone"


def times(case: Case, site: Site) -> Iterator[Finding]:
    """Whether each kind's time limit is allowed, and most of it is left to work in."""
    lead = case.cluster.signal_lead_seconds
    for name, kinds in case.partitions.items():
        limits = _time_limits(case, site, name)
        asked = {kind: 60 * case.cluster.time_limit(kind) for kind in kinds}
        good = True
        for what, most in limits.items():
            long = [kind for kind, seconds in asked.items() if most is not None and seconds > most]
            if most is not None and long:
                good = False
                yield Finding(
                    "failed",
                    f"time of {listed(long, 8)}",
                    f"asks for {max(asked[kind] for kind in long) // 60} minutes, "
                    f"{what} allows {most // 60}",
                    f"set minutes: {{{', '.join(f'{kind}: {most // 60}' for kind in long)}}}; "
                    "jobs are requeued and go on",
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
        if good and asked:
            told = ", ".join(f"{kind} {seconds // 60}" for kind, seconds in asked.items())
            yield Finding("ok", "time limits", f"{told} minutes; signalled {lead} s before")


def _time_limits(case: Case, site: Site, partition: str | None) -> dict[str, int | None]:
    """The seconds that jobs of a partition may ask for, by who says so; None is no limit."""
    names = site.names(partition)
    rows = dict(_rows(case, site, names))
    limits = {what: seconds_of(row.get("MaxWall", "")) for what, row in rows.items()}
    if any("PartitionTimeLimit" in row.get("Flags", "") for row in rows.values()):
        return limits  # such a qos stands above the partition
    most = [seconds_of(site.partitions[part].get("MaxTime", "UNLIMITED")) for part in names]
    # A job that names several goes to one that takes it.
    known = [limit for limit in most if limit is not None]
    what = "partitions" if len(names) > 1 else "partition"
    shown = f"{what} {partition or ','.join(names)}"
    return {shown: max(known) if known and len(known) == len(most) else None} | limits


def _rows(
    case: Case, site: Site, partitions: Sequence[str] = ()
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The rows of accounting that limit this user's jobs, by what people call them.

    A qos counts where the profile names it, else the account's own; and that of the partition.
    """
    if site.accounts is None:
        return
    if not (_enforced(site, "limits") or _enforced(site, "safe")):
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


def accounting(case: Case, site: Site) -> Iterator[Finding]:
    """Whether ended jobs can be asked for, and the account and qos are this user's."""
    storage = site.config.get("AccountingStorageType", "").removeprefix("accounting_storage/")
    if site.accounts is None:
        found = site.accounts_problem or "the cluster keeps no accounts"
        yield Finding("warning", "accounting", f"{found}; {_WITHOUT}", "nothing: jobs run")
        for key, value in (("account", case.cluster.account), ("qos", case.cluster.qos)):
            if value is not None:
                yield Finding("warning", f"{key} {value}", "cannot be looked up", "see below")
        return
    yield Finding("ok", "accounting", f"{storage} answers")
    yield from _account(case, site)
    yield from _qos(case, site)


def _enforced(site: Site, what: str) -> bool:
    enforced = site.config.get("AccountingStorageEnforce", "none").lower().split(",")
    return what in enforced or "all" in enforced


def _account(case: Case, site: Site) -> Iterator[Finding]:
    assert site.accounts is not None
    account = case.cluster.account
    own = sorted({row["Account"] for row in site.accounts.associations})
    enforced = any(_enforced(site, what) for what in ("associations", "limits", "qos", "safe"))
    if account is None:
        if enforced and not own:
            found, mend = "you have none, and the cluster wants one", "ask the site for an account"
            yield Finding("failed", "account", found, mend)
        else:
            yield Finding("ok", "account", "your default one")
    elif account in own:
        yield Finding("ok", f"account {account}", "yours")
    else:
        hint = nearest(account, own) if own else "you have none: ask the site"
        word: Word = "failed" if enforced else "warning"
        found = "not yours" if enforced else "not yours, which this cluster does not enforce"
        yield Finding(word, f"account {account}", found, f"set account: {hint}")
        return
    yield from _allowed(case, site, "Accounts", account)


def _qos(case: Case, site: Site) -> Iterator[Finding]:
    assert site.accounts is not None
    qos = case.cluster.qos
    if qos is None:
        return
    if qos not in site.accounts.qos:
        hint = nearest(qos, site.accounts.qos)
        yield Finding("failed", f"qos {qos}", "there is no such qos", f"set qos: {hint}")
        return
    account = case.cluster.account
    rows = [row for row in site.accounts.associations if account in (None, row["Account"])]
    own = {name for row in rows for name in row["QOS"].split(",") if name}
    if _enforced(site, "qos") and qos not in own:
        hint = f"set qos: to one of {listed(sorted(own), 8)}" if own else "ask the site"
        yield Finding("failed", f"qos {qos}", "not yours", hint)
        return
    yield Finding("ok", f"qos {qos}", "there, and yours" if qos in own else "there")
    yield from _allowed(case, site, "Qos", qos)


def _allowed(case: Case, site: Site, what: str, name: str | None) -> Iterator[Finding]:
    """Whether the partitions take jobs of that account or qos."""
    if name is None:
        return
    for partition in dict.fromkeys(p for each in case.partitions for p in site.names(each)):
        values = site.partitions[partition]
        allowed, denied = values.get(f"Allow{what}", "ALL"), values.get(f"Deny{what}", "")
        if (allowed != "ALL" and name not in allowed.split(",")) or name in denied.split(","):
            key = "account" if what == "Accounts" else "qos"
            found = f"partition {partition} does not take it"
            mend = f"set {key}: to one of {allowed}" if allowed != "ALL" else f"another {key}"
            yield Finding("failed", f"{key} {name}", found, mend)


def jobs(case: Case, site: Site) -> Iterator[Finding]:
    """Whether as many jobs and devices are allowed as the largest array and stage take."""
    shares = case.options.shares
    array, count = (
        number_of(site.config.get("MaxArraySize")),
        number_of(site.config.get("MaxJobCount")),
    )
    if array is not None and shares > 1 and shares >= array:
        found = f"MaxArraySize allows {array - 1} jobs, a cell is shared by {shares}"
        yield Finding("failed", "arrays", found, "lower hardware.evaluation_shares")
    else:
        yield Finding("ok", "arrays", f"{shares} jobs at most; MaxArraySize {array}")
    if count is not None and shares >= count:
        found = f"MaxJobCount is {count}, a cell is shared by {shares} jobs"
        yield Finding("failed", "jobs", found, "lower hardware.evaluation_shares")
    for what, row in _rows(case, site):
        most = number_of(row.get("MaxSubmitPU") or row.get("MaxSubmit"))
        if most is not None and shares > most:
            found = f"{what} takes {most} of your jobs at once, a cell is shared by {shares}"
            yield Finding("failed", "jobs", found, "lower hardware.evaluation_shares")
        yield from _devices(case, what, row)


def _devices(case: Case, what: str, row: Mapping[str, str]) -> Iterator[Finding]:
    for key in ("MaxTRES", "MaxTRESPU", "GrpTRES"):
        limits = resources(row.get(key))
        for needs, kinds in case.groups.items():
            try:
                request = Request.of(case, needs)
            except UserError:
                continue  # told by the layout's own line
            asked = {
                "gres/gpu": request.nodes * request.gpus,
                "cpu": request.nodes * request.cpus,
                "node": request.nodes,
            }
            for name, amount in asked.items():
                most = number_of(limits.get(name))
                if most is not None and amount > most:
                    found = f"{what} allows {most} of {name}, {listed(kinds, 8)} takes {amount}"
                    yield Finding(
                        "failed", f"{key} of {what}", found, "use another, or fewer ranks"
                    )


def root_only(case: Case, site: Site) -> Iterator[Finding]:
    """Partitions that take jobs of administrators alone."""
    for name in dict.fromkeys(p for each in case.partitions for p in site.names(each)):
        if site.partitions[name].get("RootOnly") == "YES" and os.geteuid():
            found = "it takes jobs of administrators alone"
            yield Finding("failed", f"partition {name}", found, "name another partition")
