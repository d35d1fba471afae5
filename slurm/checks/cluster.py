"""Checks a cluster profile: SLURM tests the batch scripts, the rest is what it does not report."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from g2rpo.config import nearest
from g2rpo.errors import UserError
from slurm.checks import limits
from slurm.checks.finding import Case, Finding, counted, listed
from slurm.checks.limits import SECONDS, Site
from slurm.checks.probe import files, look_around
from slurm.checks.trial import stage_script, trial_folder, trials
from slurm.graph import Needs
from slurm.states import ask

_UNUSABLE = re.compile(r"^down|drain|fail|error|future|inval|unknown|no_respond|reboot")


@dataclass(frozen=True)
class Node:
    """One node as sinfo shows it; state ``idle*`` means that it does not respond."""

    name: str
    state: str
    gpus: str
    cpus: str
    memory_mb: str
    features: str
    reason: str

    def usable(self, *, reserved: bool) -> bool:
        """Whether jobs can start there now or later; ``reserved``: also on reserved nodes."""
        if "*" in self.state or _UNUSABLE.search(self.state.rstrip("~#!%$@^-")):
            return False
        return reserved or not re.match("reserved|maint", self.state)

    @property
    def trouble(self) -> str:
        """Its name and why it cannot be used."""
        return f"{self.name} ({self.state}{'' if self.reason == 'none' else f': {self.reason}'})"

    @property
    def shape(self) -> str:
        """Its resources, e.g. ``gpu:2, 4 CPUs, 8 GB``."""
        memory = float(re.sub(r"\D", "", self.memory_mb) or 0) / 1024
        parts = [re.sub(r"\([^)]*\)", "", self.gpus), f"{self.cpus} CPUs", f"{memory:.0f} GB"]
        return ", ".join(part for part in (*parts, self.features) if part and part != "(null)")


def check_cluster(case: Case) -> list[Finding]:
    """Checks a cluster profile against the cluster; problems are findings, never exceptions."""
    case = replace(case, results=case.results.absolute())
    if case.cluster.kind != "slurm":
        return [*_this_machine(case), *_folder(case, {})]
    findings: list[Finding] = []
    usable: dict[str | None, int] = {}
    try:
        site = Site.read()
        ask("squeue", "--me", "--noheader")
        name, version = site.config.get("ClusterName"), site.config.get("SLURM_VERSION")
        findings.append(Finding("ok", "SLURM", f"cluster {name} answers, version {version}"))
        reserved = "reservation" in case.cluster.extra  # reserved nodes may be its own
        good: dict[str | None, list[Node]] = {}
        for partition in case.partitions:
            nodes = nodes_of(site, partition)
            good[partition] = [node for node in nodes if node.usable(reserved=reserved)]
            usable[partition] = len(good[partition])
            findings += _nodes(partition or ",".join(site.names(None)), nodes, good[partition])
        for needs, kinds in case.groups.items():
            findings.append(_verdict(case, site, needs, kinds, good))
        for check in (limits.times, limits.arrays, limits.memory, limits.preemption):
            findings += check(case, site)
        findings.append(_accounting())
    except UserError as error:
        fix = "run this on a login node, or use --cluster local; see `scontrol ping`"
        findings.append(Finding("failed", "SLURM", str(error), fix))
    here = files(case.question.files, "here")
    return [*findings, *_image(case), *here, *_folder(case, usable)]


def nodes_of(site: Site, partition: str | None) -> list[Node]:
    """The nodes of a profile's ``partition``.

    Raises:
        UserError: SLURM does not answer.
    """
    names = site.names(partition)
    if not names:
        return []
    shown = ("--noheader", "--Node", "--format=%N|%T|%G|%c|%m|%f|%E", f"-p{','.join(names)}")
    rows = [line.split("|", 6) for line in ask("sinfo", *shown, seconds=SECONDS).splitlines()]
    return list({row[0]: Node(*map(str.strip, row)) for row in rows if len(row) == 7}.values())


def _nodes(partition: str, nodes: list[Node], good: list[Node]) -> Iterator[Finding]:
    """The usable nodes of a partition: sbatch does not say why it has none to offer."""
    what = f"nodes of {partition}"
    bad = [node for node in nodes if node not in good]
    if bad:
        yield Finding(
            "warning" if good else "failed",
            what,
            f"{len(good)} of {len(nodes)} usable; not {listed(node.trouble for node in bad)}",
            f"administrator: `scontrol update NodeName={bad[0].name} State=RESUME`",
        )
    elif nodes:  # sbatch reports an unknown partition
        yield Finding("ok", what, f"{counted(len(nodes), 'node')}, all usable")


def _verdict(
    case: Case,
    site: Site,
    needs: Needs,
    kinds: tuple[str, ...],
    usable: dict[str | None, list[Node]],
) -> Finding:
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
        partition = case.cluster.partition_of(needs)
        return Finding("failed", what, found, _fix(str(error).lower(), site, partition, usable))
    start = re.search(r"to start at .*", answer)
    return Finding("ok", what, f"would {start[0][3:]}" if start else "yes")


def _fix(
    error: str, site: Site, partition: str | None, usable: dict[str | None, list[Node]]
) -> str:
    """The profile keys to change if SLURM rejects a batch script."""
    if "account" in error:
        return "set account: (`sacctmgr show association user=$USER` lists yours)"
    if "qos" in error:
        return f"set qos: to one of {listed(sorted(site.qos), 8)}"
    if "partition" in error:
        return f"set partition: {nearest(partition or '', site.partitions)}"
    shapes = Counter(node.shape for node in usable[partition])
    have = "; ".join(f"{counted(n, 'node')} with {shape}" for shape, n in shapes.items())
    return (
        f"usable: {have or 'no nodes'}; change gpus_per_node, gpu_type, cpus_per_task, "
        "memory_gb_per_task or constraint to match, or use fewer ranks"
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


def _this_machine(case: Case) -> Iterator[Finding]:
    """Whether this machine has the devices and the memory of each kind of stage."""
    import torch  # slow to import; checking a cluster does not need it

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for needs, kinds in case.groups.items():
        what = f"devices of {listed(kinds, 8)}"
        if needs.gpus > count:
            found = f"needs {counted(needs.gpus, 'GPU')}, torch sees {count}"
            fix = "run it on a machine with GPUs, or use a smaller profile (mini needs none)"
            yield Finding("failed", what, found, fix)
        else:
            yield Finding("ok", what, f"needs {needs.gpus} of {counted(count, 'GPU')}")
    memory = psutil.virtual_memory().total / 2**30
    wanted = max((needs.memory_gb or 0 for needs in case.wanted.values()), default=0)
    found = f"{memory:.0f} GiB; {counted(os.cpu_count() or 1, 'CPU')}"
    fix = f"needs {wanted} GB: use a larger machine, or a cluster (--cluster)"
    good = memory >= wanted
    yield Finding("ok" if good else "failed", "memory", found, "" if good else fix)


def _folder(case: Case, usable: dict[str | None, int]) -> Iterator[Finding]:
    """The results folder here, and as jobs see it."""
    what = f"the folder {case.results}"
    try:
        with trial_folder(case.results) as folder:
            if case.cluster.kind != "slurm":
                yield Finding("ok", what, "writable")
                gpus = any(needs.gpus for needs in case.wanted.values())
                here = {"modules": (), "artifacts": (), "gpus": gpus}
                yield from look_around(case.question.model_copy(update=here), folder, "here")
            elif case.quick:
                yield Finding("ok", what, "writable here; not checked in a job (--quick)")
            elif usable:
                yield from trials(case, folder, usable)
    except OSError as error:
        found = f"not writable ({error.strerror})"
        yield Finding("failed", what, found, "pass --results with a folder you can write to")
