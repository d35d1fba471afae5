"""What keeps the jobs of a plan from ever running, found before the first of them is submitted."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from g2rpo.config import nearest
from g2rpo.errors import UserError
from slurm.cluster import Cluster
from slurm.doctor import limits
from slurm.doctor.finding import Case, Finding, Options
from slurm.doctor.site import Site, ask
from slurm.flags import KNOWN
from slurm.graph import Needs


def refuse_impossible(cluster: Cluster, wanted: Mapping[str, Needs], shares: int) -> None:
    """Refuses a profile under which stages could never run; what only SLURM knows it is asked.

    Args:
        cluster: the profile.
        wanted: the devices of each kind of stage that is to run.
        shares: jobs of the largest array.

    Raises:
        UserError: the first reason, in one line.
    """
    if cluster.kind != "slurm" or not wanted:
        return
    case = Case(cluster, wanted, Path(), Options(shares=shares))
    for needs in case.groups:
        cluster.tasks(needs)
    for finding in _findings(case):
        if finding.word == "failed":
            raise UserError(
                f"cluster {cluster.name}: {finding.what}: {finding.found}; {finding.mend}"
            )


def _findings(case: Case) -> Iterator[Finding]:
    yield from unknown_flags(case)
    try:
        site = Site.read(with_nodes=False)
    except UserError:
        return  # a plan needs no cluster; submitting tells what is wrong with it
    yield from limits.times(case, site)
    yield from limits.jobs(case, site)


def unknown_flags(case: Case) -> Iterator[Finding]:
    """Flags in ``extra`` that sbatch does not know, plug-ins of the site included."""
    unknown = {name.replace("_", "-") for name in case.cluster.extra} - KNOWN
    if not unknown:
        return
    try:
        listed = set(re.findall(r"--([a-z][a-z0-9-]*)", ask("sbatch", "--help")))
    except UserError:
        listed = set()
    found = "sbatch has no such flag"
    if not listed:
        found += " of its own, and is not here to tell those of the site's plug-ins"
    for name in sorted(unknown - listed):
        yield Finding("failed", f"extra: {name}", found, nearest(name, KNOWN | listed))
