"""The examination of a cluster profile: all checks in order, each answering with its own lines."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from g2rpo.errors import UserError
from slurm.cluster import Cluster
from slurm.doctor import limits, nodes, place, requeue, trial
from slurm.doctor.answers import disk
from slurm.doctor.beforehand import unknown_flags
from slurm.doctor.finding import Case, Finding, Options, listed
from slurm.doctor.site import Site, ask, missing
from slurm.graph import Needs

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun")
Check = Callable[[Case, Site], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    nodes.partitions,
    limits.root_only,
    nodes.layout,
    nodes.constraint,
    limits.times,
    limits.accounting,
    limits.jobs,
    requeue.requeueing,
    requeue.preemption,
    requeue.cancelling,
)


def examine(
    cluster: Cluster,
    wanted: Mapping[str, Needs],
    results: Path,
    options: Options = Options(),  # noqa: B008 - it does not change
) -> list[Finding]:
    """Checks a cluster profile against the cluster.

    Args:
        cluster: the profile.
        wanted: the devices of each kind of stage, e.g. of ``train``.
        results: the folder that jobs write to.
        options: what else is looked for.

    Returns:
        One finding for each thing looked at. Nothing is raised for what is wrong there.
    """
    case = Case(cluster, wanted, results.absolute(), options)
    if cluster.kind != "slurm":
        return [*place.this_machine(case), *place.files(case), *_folder(case, None)]
    site, findings = _ask_slurm()
    findings += unknown_flags(case)
    if site is not None:
        findings += _checks(case, site)
    return [*findings, *place.container(case), *place.files(case), *_folder(case, site)]


def _ask_slurm() -> tuple[Site | None, list[Finding]]:
    gone = missing(*COMMANDS)
    if gone:
        found = f"{listed(gone, 8)}: not found"
        mend = "run this where jobs are submitted from, or use --cluster local"
        return None, [Finding("failed", "SLURM", found, mend)]
    try:
        site = Site.read()
        ask("squeue", "--me", "--noheader")
    except UserError as error:
        return None, [Finding("failed", "SLURM", str(error), "does `scontrol ping` answer?")]
    name, version = site.config.get("ClusterName"), site.config.get("SLURM_VERSION")
    return site, [Finding("ok", "SLURM", f"cluster {name} answers, version {version}")]


def _checks(case: Case, site: Site) -> Iterator[Finding]:
    for check in CHECKS:
        yield from check(case, site)
    yield from trial.verdicts(case)


def _folder(case: Case, site: Site | None) -> Iterator[Finding]:
    """The results folder here, its disk, and what a job sees of both."""
    what = f"the folder {case.results}"
    try:
        with trial.trial_folder(case.results) as folder:
            if case.cluster.kind != "slurm":
                yield Finding("ok", what, "can be written to")
                yield disk(case, shutil.disk_usage(folder).free / 1e9, "disk")
            elif case.options.quick:
                yield Finding("ok", what, "can be written to here; no job was asked to (--quick)")
            elif site is not None:
                usable = {
                    name: len(nodes.usable(case, site.nodes_of(name))) for name in case.partitions
                }
                yield from trial.trials(case, folder, usable)
    except OSError as error:
        found = f"cannot be written to ({error.strerror})"
        yield Finding("failed", what, found, "--results: a folder that you may write to")
