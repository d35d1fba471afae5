"""What can be looked at without SLURM: the results folder, files, the image, this machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from g2rpo.errors import UserError
from slurm.doctor.answers import gpu_memory
from slurm.doctor.finding import Case, Finding, counted, listed
from slurm.doctor.site import ask


def files(case: Case) -> Iterator[Finding]:
    """Whether what jobs read is there."""
    absent = [str(path) for path in case.options.files if not path.exists()]
    if absent:
        yield Finding(
            "failed",
            "files",
            f"not there: {listed(absent)}",
            "fetch them first (`g2rpo prompts --help`)",
        )
    elif case.options.files:
        yield Finding("ok", "files", f"all {len(case.options.files)} there")


def container(case: Case) -> Iterator[Finding]:
    """Whether the image is there, and srun starts containers where that is asked of it."""
    kind, image = case.cluster.container.kind, case.cluster.container.image
    if image is None or kind == "none":
        return
    if kind == "pyxis":
        try:
            known = "--container-image" in ask("srun", "--help")
        except UserError:
            known = False
        if not known:
            found = "srun has no --container-image: pyxis is not installed"
            mend = "container.kind: apptainer or podman; or ask the site for pyxis"
            yield Finding("failed", "container", found, mend)
    is_file = kind != "podman" and (image.endswith((".sif", ".sqsh")) or image.startswith("/"))
    if is_file and not Path(image).is_file():
        mend = "build it (docs), or set container.image to where it is"
        yield Finding("failed", "image", f"{image}: no such file", mend)
    elif is_file:
        size = Path(image).stat().st_size / 1e9
        yield Finding("ok", "image", f"{image}, {size:.1f} GB")
    else:
        found = f"{image}: found by {kind} when a job starts, if its nodes reach it"
        mend = "" if kind == "podman" else "a file on a shared disk starts faster"
        yield Finding("ok", "image", found, mend)


def this_machine(case: Case) -> Iterator[Finding]:
    """Whether this machine has the devices and the memory of each kind of stage."""
    yield from _devices(case)
    total = psutil.virtual_memory().total / 2**30
    available = psutil.virtual_memory().available / 2**30
    wanted = max((needs.memory_gb or 0 for needs in case.wanted.values()), default=0)
    found = f"{total:.0f} GiB, {available:.0f} free; {counted(os.cpu_count() or 1, 'CPU')}"
    if total < wanted:
        mend = f"needs {wanted} GB: use a larger machine, or a cluster (--cluster)"
        yield Finding("failed", "memory", found, mend)
    else:
        yield Finding("ok", "memory", found)


def _devices(case: Case) -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for needs, kinds in case.groups.items():
        what = f"devices of {listed(kinds, 8)}"
        if needs.gpus > count:
            found = f"needs {counted(needs.gpus, 'GPU')}, torch sees {count}"
            mend = "run it where they are, or take a smaller profile (mini runs anywhere)"
            yield Finding("failed", what, found, mend)
        elif needs.gpus:
            yield Finding("ok", what, f"needs {needs.gpus} of {counted(count, 'GPU')}")
        else:
            yield Finding("ok", what, "need no GPU")
    if count and any(needs.gpus for needs in case.wanted.values()):
        properties = [torch.cuda.get_device_properties(index) for index in range(count)]
        found_gpus = [
            {"name": each.name, "memory_gb": each.total_memory / 2**30} for each in properties
        ]
        yield gpu_memory(case, found_gpus, "GPUs")
