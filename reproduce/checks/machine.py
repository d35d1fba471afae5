"""Devices, driver, versions and memory of this machine, or of this container."""

import importlib.metadata
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from g2rpo.provenance import REPOSITORY, git_state
from reproduce.checks.finding import Finding, Word, gibibytes

LOCK = REPOSITORY / "requirements" / "runtime.lock"
DRIVER = Path("/proc/driver/nvidia/version")
DEVICE = Path("/dev/nvidiactl")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
"""Where processes of one machine exchange tensors: NCCL's ranks and loaders of data."""
SHOWN = ("torch", "diffusers", "transformers", "accelerate")
BFLOAT16 = (8, 0)
"""Compute capability from which on the tensor cores multiply bfloat16."""


@dataclass(frozen=True)
class Devices:
    """What is known of the GPUs.

    Attributes:
        names: one for each usable GPU, its memory in it.
        capabilities: compute capability of each.
        driver: the loaded driver's version; None where there is none.
        visible: whether the driver's device files are here (in a container: were passed on).
        error: why torch cannot use what is there.
    """

    names: tuple[str, ...] = ()
    capabilities: tuple[tuple[int, int], ...] = ()
    driver: str | None = None
    visible: bool = False
    error: str = ""


def find_devices() -> Devices:
    """Asks the driver and torch; never raises."""
    names, capabilities, error = [], [], ""
    try:
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            names.append(f"{found.name}, {gibibytes(found.total_memory)}")
            capabilities.append((found.major, found.minor))
        if not names and DEVICE.exists():
            torch.cuda.init()
    except (RuntimeError, AssertionError) as problem:
        names, capabilities = [], []
        error = str(problem).strip().split("\n")[0]
    return Devices(tuple(names), tuple(capabilities), _driver(), DEVICE.exists(), error)


def _driver() -> str | None:
    try:
        text = DRIVER.read_text()
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found.group() if found else "of unknown version"


def judge_devices(devices: Devices, *, required: bool) -> Finding:
    """Whether the GPUs can be used; without one it is a note unless one is ``required``."""
    cuda = torch.version.cuda
    if devices.names:
        counts = {name: devices.names.count(name) for name in devices.names}
        text = "; ".join(f"{count} x {name}" for name, count in counts.items())
        text += f"; driver {devices.driver or 'of unknown version'}"
        if min(devices.capabilities) < BFLOAT16:
            return Finding(
                "GPU", "warning", text,
                "too old for fast bfloat16; the profile flux needs compute capability 8.0 or newer",
            )  # fmt: skip
        return Finding("GPU", "ok", text)
    if devices.visible:
        return Finding(
            "GPU", "failed",
            f"driver {devices.driver or 'of unknown version'} is here and torch cannot use it "
            f"({devices.error or 'it shows no device'})",
            f"install a driver for CUDA {cuda} or newer, and check CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    word: Word = "failed" if required else "note"
    if devices.driver is not None:
        return Finding(
            "GPU", word, f"driver {devices.driver} is loaded, but no device is passed on to here",
            "docker: --gpus all; podman: --device nvidia.com/gpu=all; Apptainer: --nv",
        )  # fmt: skip
    return Finding(
        "GPU", word, "none",
        "run it where there is one" if required
        else "the profiles smoke and mini need none, flux and flux-lora do",
    )  # fmt: skip


def check_machine() -> Finding:
    """Cores and memory that this process may use, a container's limit counted in."""
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no limit, or none that is written there
            continue
    return judge_machine(cores, memory)


def judge_machine(cores: int, memory: int) -> Finding:
    """The mini profile's workers take about a gibibyte each."""
    text = f"{cores} cores, {gibibytes(memory)} of memory"
    if memory < 4 * 2**30:
        return Finding("machine", "warning", text, "give it 4 GiB or more, or run with `--jobs 1`")
    return Finding("machine", "ok", text)


def locked_versions(lock: Path) -> dict[str, str]:
    """Names, lower case with ``-``, and versions of a lock file; none where there is no file."""
    try:
        text = lock.read_text()
    except OSError:
        return {}
    found = re.findall(r"^([\w.-]+)==(\S+)(?: ;.*sys_platform == 'linux'.*)?", text, re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


def installed_versions() -> dict[str, str]:
    """Names, lower case with ``-``, and versions of what this Python can import."""
    return {
        re.sub(r"[-_.]+", "-", distribution.name).lower(): distribution.version
        for distribution in importlib.metadata.distributions()
    }


def judge_packages(locked: Mapping[str, str], installed: Mapping[str, str]) -> Finding:
    """Whether the installed packages are the locked ones, from which the results were measured."""
    text = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}"
    if torch.cuda.is_available():
        text += f", cuDNN {torch.backends.cudnn.version()}"
        text += ", NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    text += "), " + ", ".join(f"{name} {installed.get(name, 'missing')}" for name in SHOWN[1:])
    if not locked:
        return Finding("packages", "note", f"{text}; no lock file to compare with")
    other = [
        f"{name} {installed[name]} (locked: {version})"
        for name, version in locked.items()
        if installed.get(name, version) != version
    ]
    if other:
        listed = ", ".join(other[:5]) + (", …" if len(other) > 5 else "")
        return Finding(
            "packages", "warning", f"{text}; {len(other)} differ from the lock: {listed}",
            "`make setup` installs the locked versions",
        )  # fmt: skip
    return Finding("packages", "ok", f"{text}; all as locked")


def check_packages() -> Finding:
    """:func:`judge_packages` of what is here."""
    return judge_packages(locked_versions(LOCK), installed_versions())


def check_code() -> Finding:
    """Whether results made here can name the commit that made them."""
    commit, changed = git_state()
    if commit is None:
        return Finding(
            "code", "warning", "commit unknown, so that results cannot name it",
            "run from a git checkout, or from an image that `make image` built",
        )  # fmt: skip
    state = {None: "", True: ", with changes that are not committed", False: ""}[changed]
    return Finding("code", "ok" if not changed else "note", f"commit {commit[:12]}{state}")


def check_shared_memory(gpus: int) -> Finding:
    """:func:`judge_shared_memory` of ``/dev/shm``."""
    try:
        size = psutil.disk_usage(str(SHARED_MEMORY)).total
    except OSError:
        size = 0
    return judge_shared_memory(size, gpus)


def judge_shared_memory(size: int, gpus: int) -> Finding:
    """Docker gives a container 64 MiB, too little for NCCL between several GPUs."""
    text = f"{gibibytes(size)} in {SHARED_MEMORY}"
    if size >= 2**30:
        return Finding("shared memory", "ok", text)
    if gpus < 2:
        return Finding("shared memory", "note", f"{text}; enough for one process")
    return Finding(
        "shared memory", "warning", text,
        "give the container 1 GiB or more (--shm-size 8g, or --ipc host)",
    )  # fmt: skip
