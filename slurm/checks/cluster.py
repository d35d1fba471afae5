"""The check of a cluster profile. SLURM judges the job texts; the rest is what it does not see."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil

from g2rpo.config import nearest
from g2rpo.errors import UserError
from slurm.checks import limits
from slurm.checks.finding import Case, Finding, counted, listed
from slurm.checks.probe import Question, files, look_around
from slurm.checks.site import Node, Site
from slurm.checks.trial import stage_script, trial_folder, trials
from slurm.graph import Needs
from slurm.states import ask


def check_cluster(case: Case) -> list[Finding]:
    """Checks a cluster profile against the cluster; nothing is raised for what is wrong there."""
    case = replace(case, results=case.results.absolute())
    if case.cluster.kind != "slurm":
        return [*_this_machine(case), *_folder(case, {})]
    findings = list(limits.unknown_flags(case))
    usable: dict[str | None, int] = {}
    try:
        site = Site.read()
        ask("squeue", "--me", "--noheader")
        name, version = site.config.get("ClusterName"), site.config.get("SLURM_VERSION")
        findings.append(Finding("ok", "SLURM", f"cluster {name} answers, version {version}"))
        nodes = {name: site.nodes_of(name) for name in case.partitions}
        usable = {name: len(_usable(case, each)) for name, each in nodes.items()}
        findings += _nodes(case, site, nodes)
        findings += _verdicts(case, site, nodes)
        for check in (
            limits.times, limits.jobs, limits.memory, limits.accounting, limits.stopping,
        ):  # fmt: skip
            findings += check(case, site)
    except UserError as error:
        fix = "run this where jobs are submitted from, or use --cluster local; `scontrol ping`"
        findings.append(Finding("failed", "SLURM", str(error), fix))
    here = files(tuple(map(str, case.files)), "here")
    return [*findings, *_image(case), *here, *_folder(case, usable)]


def _usable(case: Case, nodes: list[Node]) -> list[Node]:
    """Those on which jobs can start; with a reservation, nodes set aside may be its own."""
    return [node for node in nodes if node.usable(reserved="reservation" in case.cluster.extra)]


def _nodes(case: Case, site: Site, nodes: dict[str | None, list[Node]]) -> Iterator[Finding]:
    """Each partition's nodes: sbatch does not say why it has none to offer."""
    for name, each in nodes.items():
        if not each:
            continue  # sbatch's own line says so
        what = f"nodes of {name or ','.join(site.names(None))}"
        good = _usable(case, each)
        if len(good) == len(each):
            yield Finding("ok", what, f"{counted(len(each), 'node')}, all usable")
            continue
        bad = [node for node in each if node not in good]
        yield Finding(
            "warning" if good else "failed",
            what,
            f"{len(good)} of {len(each)} usable; not {listed(node.trouble for node in bad)}",
            f"an administrator: `scontrol update NodeName={bad[0].name} State=RESUME`",
        )


def _verdicts(case: Case, site: Site, nodes: dict[str | None, list[Node]]) -> Iterator[Finding]:
    """What ``sbatch --test-only`` says of the batch script of each kind of stage."""
    for needs, kinds in case.groups.items():
        what = f"sbatch takes {listed(kinds, 8)}"
        # The longest kind is the hardest to take.
        kind = max(kinds, key=case.cluster.time_limit)
        try:
            text = stage_script(case.cluster, kind, needs, case.results)
        except UserError as error:
            found, _, fix = str(error).partition(": ")[2].partition("; ")
            yield Finding("failed", what, found, fix)
            continue
        try:
            told = ask("sbatch", "--test-only", text=text, both=True).strip().splitlines()
        except UserError as error:
            flags = r"^#SBATCH (--(?:nodes|ntasks|gpus|gres|cpus|mem|partition|constraint)\S*)"
            asked = " ".join(re.findall(flags, text, re.MULTILINE))
            found = f"{error}; asked for {asked}"
            yield Finding("failed", what, found, _fix(case, site, needs, str(error), nodes))
            continue
        start = re.search(r"to start at .*", told[-1]) if told else None
        yield Finding("ok", what, f"would {start[0][3:]}" if start else "yes")


def _fix(
    case: Case, site: Site, needs: Needs, error: str, nodes: dict[str | None, list[Node]]
) -> str:
    """What of the profile to change, where SLURM refuses a job text."""
    cluster, lower = case.cluster, error.lower()
    partition = cluster.partition_of(needs)
    accounts = site.accounts
    if "partition name" in lower and partition:
        key = "partition" if partition == cluster.partition else "cpu_partition"
        return f"set {key}: {nearest(partition, site.partitions)}"
    if "no partition" in lower:
        return f"set partition: to one of {listed(sorted(site.partitions), 8)}"
    if "account" in lower and accounts is not None:
        own = sorted({row["Account"] for row in accounts.associations})
        return f"set account: to one of {listed(own, 8)}" if own else "ask the site for an account"
    if "qos" in lower and accounts is not None:
        return f"set qos: to one of {listed(sorted(accounts.qos), 8)}"
    shapes = Counter(node.shape for node in _usable(case, nodes[partition]))
    have = "; ".join(f"{counted(n, 'node')} with {shape}" for shape, n in shapes.items())
    return (
        f"usable are {have or 'no nodes'}: set gpus_per_node, gpu_type, cpus_per_task, "
        "memory_gb_per_task or constraint to what they have, or use fewer ranks"
    )


def _image(case: Case) -> Iterator[Finding]:
    """A container's image file must be here: the job's own message is less clear."""
    kind, image = case.cluster.container.kind, case.cluster.container.image
    if image is None or kind == "podman":
        return
    if (image.endswith((".sif", ".sqsh")) or image.startswith("/")) and not Path(image).is_file():
        fix = "build it (`make sif`), or set container.image to where it is"
        yield Finding("failed", "image", f"{image}: no such file", fix)
    else:
        yield Finding("ok", "image", image)


def _this_machine(case: Case) -> Iterator[Finding]:
    """Whether this machine has the devices and the memory of each kind of stage."""
    import torch  # takes seconds, and a cluster's check does not need it here

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for needs, kinds in case.groups.items():
        what = f"devices of {listed(kinds, 8)}"
        if needs.gpus > count:
            found = f"needs {counted(needs.gpus, 'GPU')}, torch sees {count}"
            fix = "run it where they are, or take a smaller profile (mini runs anywhere)"
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
    """The results folder here, and what a job sees of it."""
    what = f"the folder {case.results}"
    try:
        with trial_folder(case.results) as folder:
            if case.cluster.kind != "slurm":
                yield Finding("ok", what, "can be written to")
                question = Question(
                    files=tuple(map(str, case.files)),
                    gpus=any(needs.gpus for needs in case.wanted.values()),
                    gpu_memory_gb=case.gpu_memory_gb,
                    disk_gb=case.disk_gb,
                )
                yield from look_around(question, folder, "here")
            elif case.quick:
                yield Finding("ok", what, "can be written to here; no job was asked to (--quick)")
            elif usable:
                yield from trials(case, folder, usable)
    except OSError as error:
        found = f"cannot be written to ({error.strerror})"
        yield Finding("failed", what, found, "--results: a folder that you may write to")
