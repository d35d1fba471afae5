"""Checks a cluster profile: SLURM tests the batch scripts, and we what it does not report."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil

from g2rpo.config import nearest
from g2rpo.errors import UserError
from slurm.checks import limits
from slurm.checks.finding import Case, Finding, Word, listed
from slurm.checks.limits import SECONDS, Site
from slurm.checks.probe import files, look_around
from slurm.checks.trial import stage_script, trial_folder, trials
from slurm.cluster import Cluster
from slurm.graph import Needs
from slurm.states import ask

_UNUSABLE = re.compile(r"[*]|^down|drain|fail|error|future|inval|unknown|no_respond|reboot")


def check_cluster(case: Case) -> list[Finding]:
    """Checks a cluster profile against the cluster; problems are findings, never exceptions."""
    case = replace(case, results=case.results.absolute())
    if case.cluster.kind != "slurm":
        return list(_folder(case))
    findings: list[Finding] = []
    usable: set[str | None] | None = None
    try:
        site = Site.read()
        ask("squeue", "--me", "--noheader")
        name, version = site.config.get("ClusterName"), site.config.get("SLURM_VERSION")
        findings.append(Finding("ok", "SLURM", f"cluster {name} answers, version {version}"))
        usable = set()
        for partition in case.partitions:
            if names := ",".join(site.names(partition)):  # sbatch reports an unknown partition
                nodes = _nodes(names)
                findings.append(nodes)
                usable |= {partition} if nodes.word != "failed" else set()
        findings += [_verdict(case, site, needs, kinds) for needs, kinds in case.groups.items()]
        for check in (limits.times, limits.arrays, limits.memory, limits.preemption):
            findings += check(case, site)
        findings.append(_accounting())
    except UserError as error:
        fix = "run this on a login node, or use --cluster local; see `scontrol ping`"
        findings.append(Finding("failed", "SLURM", str(error), fix))
    here = files(case.question.files, "here")
    return [*findings, *_image(case), *here, *_folder(case, usable)]


def _nodes(partition: str) -> Finding:
    """The nodes of a partition by state: sbatch does not say why it has none to offer.

    Raises:
        UserError: SLURM does not answer.
    """
    shown = ("--noheader", f"--partition={partition}", "--format=%N|%T|%G, %c CPUs, %m MB|%E")
    rows = [line.split("|", 3) for line in ask("sinfo", *shown, seconds=SECONDS).splitlines()]
    rows = [list(map(str.strip, row)) for row in rows if len(row) == 4]
    bad = [row for row in rows if _UNUSABLE.search(row[1])]
    found = "; ".join(
        f"{names} {state} ({reason if _UNUSABLE.search(state) else shape})"
        for names, state, shape, reason in rows
    ).replace("(null), ", "")
    what, fix = (
        f"nodes of {partition}",
        "administrator: `scontrol update NodeName=... State=RESUME`",
    )
    if bad or not rows:
        word: Word = "warning" if len(bad) < len(rows) else "failed"
        return Finding(word, what, found or "none", fix)
    return Finding("ok", what, found)


def _verdict(case: Case, site: Site, needs: Needs, kinds: tuple[str, ...]) -> Finding:
    """The answer of ``sbatch --test-only`` to the batch script of some kinds of stage."""
    what = f"sbatch accepts {listed(kinds, 8)}"
    kind = max(kinds, key=case.cluster.time_limit)
    try:
        text = stage_script(case.cluster, kind, needs, case.results)
    except UserError as error:
        found, _, fix = str(error).partition(": ")[2].partition("; ")
        return Finding("failed", what, found, fix)
    try:
        answer = ask("sbatch", "--test-only", text=text, both=True).strip()
    except UserError as error:
        flags = r"^#SBATCH (--(?:nodes|ntasks|gpus|gres|cpus|mem|partition|constraint)\S*)"
        found = f"{error}; requested {' '.join(re.findall(flags, text, re.MULTILINE))}"
        fix = _fix(str(error).lower(), site, case.cluster, needs)
        return Finding("failed", what, found, fix)
    start = re.search(r"to start at .*", answer)
    return Finding("ok", what, f"would {start[0][3:]}" if start else "yes")


def _fix(error: str, site: Site, cluster: Cluster, needs: Needs) -> str:
    """The profile keys to change if SLURM rejects a batch script."""
    if "account" in error:
        return "set account: (`sacctmgr show association user=$USER` lists yours)"
    if "qos" in error and site.qos:
        return f"set qos: to one of {listed(sorted(site.qos), 8)}"
    if "partition name" in error or "no partition" in error:
        partition = cluster.partition_of(needs)
        key = "partition" if partition == cluster.partition else "cpu_partition"
        return f"set {key}: {nearest(partition or '', site.partitions)}"
    return (
        "change gpus_per_node, gpu_type, cpus_per_task, memory_gb_per_task or constraint to what "
        "the nodes have, or use fewer ranks"
    )


def _accounting() -> Finding:
    """Whether SLURM remembers how jobs ended."""
    try:
        ask("sacct", "--allocations", "--noheader", "--jobs=1", seconds=SECONDS)
    except UserError as error:
        found = f"{error}; how jobs ended is read from their results only"
        return Finding("warning", "accounting", found, "none needed: jobs run")
    return Finding("ok", "accounting", "sacct answers")


def _image(case: Case) -> Iterator[Finding]:
    """A container's image file must exist: the job's own error is less clear."""
    kind, image = case.cluster.container.kind, case.cluster.container.image
    if image is None or kind == "podman":
        return
    if (image.endswith((".sif", ".sqsh")) or image.startswith("/")) and not Path(image).is_file():
        fix = "build it (`make sif`), or correct container.image"
        yield Finding("failed", "image", f"{image}: no such file", fix)
    else:
        yield Finding("ok", "image", image)


def _memory(case: Case) -> Iterator[Finding]:
    """Whether this machine has the main memory that stages need."""
    has = psutil.virtual_memory().total / 2**30
    wanted = max((needs.memory_gb or 0 for needs in case.wanted.values()), default=0)
    if has < wanted:
        found = f"{has:.0f} GiB, a stage needs {wanted} GB"
        yield Finding("failed", "memory here", found, "use a smaller profile or a larger machine")


def _folder(case: Case, usable: set[str | None] | None = None) -> Iterator[Finding]:
    """The results folder here, and as jobs see it; ``usable``: partitions with usable nodes."""
    what = f"the folder {case.results}"
    try:
        with trial_folder(case.results) as folder:
            if case.cluster.kind != "slurm":
                yield Finding("ok", what, "writable")
                yield from _memory(case)
                gpus = max((needs.gpus for needs in case.wanted.values()), default=0)
                here = {"modules": (), "artifacts": (), "gpus": gpus}
                yield from look_around(case.question.model_copy(update=here), folder, "here")
            elif case.quick:
                yield Finding("ok", what, "writable here; not checked in a job (--quick)")
            elif usable is not None:
                yield from trials(case, folder, usable)
    except OSError as error:
        found = f"not writable ({error.strerror})"
        yield Finding("failed", what, found, "pass --results with a folder you can write to")
