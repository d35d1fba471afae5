"""``g2rpo check machine``: devices, driver, versions and memory of this machine or container."""

import importlib.metadata
import os
import re
import tempfile
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants

from g2rpo.files import writable_by_others
from g2rpo.provenance import REPOSITORY, git_state
from reproduce.checks.flux_blocks import check_blocks
from reproduce.checks.whole_path import check_whole_path
from reproduce.experiment import load_profile
from reproduce.experiment.weights import missing_weights
from slurm.checks.finding import Finding, Word

LOCK = REPOSITORY / "uv.lock"
DRIVER = Path("/proc/driver/nvidia/version")
DEVICE = Path("/dev/nvidiactl")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
"""Where NCCL ranks and data loaders on one machine exchange tensors."""
SHOWN = ("torch", "diffusers", "transformers", "accelerate")
BFLOAT16 = (8, 0)
"""Lowest compute capability with bfloat16 tensor cores."""
LITTLE = 5 * 2**30
"""Free bytes below which the runs of a table may not fit."""


def check_machine(results: Path, *, require_gpu: bool, quick: bool) -> list[Finding]:
    """Runs all checks; unless ``quick``, also trains and scores tiny models once."""
    devices = find_devices()
    absent = missing_weights(load_profile("flux"))
    size = sum(state.artifact.size()[0] or 0 for state in absent)
    findings = [
        check_memory(len(os.sched_getaffinity(0)), _memory()),
        check_devices(devices, required=require_gpu),
        check_packages(locked_versions(LOCK), _installed_versions()),
        _check_code(),
        check_shared_memory(_size(SHARED_MEMORY), len(devices.names)),
        check_results(results),
        check_cache(Path(constants.HF_HUB_CACHE), len(absent), size),
    ]
    if not quick:
        findings.append(check_whole_path())
        if devices.names:
            findings.append(check_blocks())
    return findings


@dataclass(frozen=True)
class Devices:
    """The GPUs of this machine.

    Attributes:
        names: name and memory of each usable GPU.
        capabilities: compute capability of each.
        driver: version of the loaded driver; None without one.
        visible: whether the driver's device files exist (in a container: were passed on).
        error: why torch cannot use the GPUs.
    """

    names: tuple[str, ...] = ()
    capabilities: tuple[tuple[int, int], ...] = ()
    driver: str | None = None
    visible: bool = False
    error: str = ""


def find_devices() -> Devices:
    """Queries the driver and torch; never raises."""
    names, capabilities, error, driver = [], [], "", None
    try:
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            names.append(f"{gpu.name}, {gibibytes(gpu.total_memory)}")
            capabilities.append((gpu.major, gpu.minor))
        if not names and DEVICE.exists():
            torch.cuda.init()
    except (RuntimeError, AssertionError) as problem:
        names, capabilities = [], []
        error = str(problem).strip().split("\n")[0]
    if DRIVER.exists():
        version = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER.read_text())
        driver = version.group() if version else "of unknown version"
    return Devices(tuple(names), tuple(capabilities), driver, DEVICE.exists(), error)


def check_devices(devices: Devices, *, required: bool) -> Finding:
    """Whether the GPUs are usable; having none fails only if one is ``required``."""
    driver = devices.driver or "of unknown version"
    if devices.names:
        counts = {name: devices.names.count(name) for name in devices.names}
        text = "; ".join(f"{count} x {name}" for name, count in counts.items())
        text += f"; driver {driver}"
        if min(devices.capabilities) < BFLOAT16:
            fix = "too old for fast bfloat16; profile flux needs compute capability 8.0 or higher"
            return Finding("warning", "GPU", text, fix)
        return Finding("ok", "GPU", text)
    if devices.visible:
        text = f"torch cannot use driver {driver} ({devices.error or 'it shows no device'})"
        fix = f"install a driver for CUDA {torch.version.cuda} or newer; check CUDA_VISIBLE_DEVICES"
        return Finding("failed", "GPU", text, fix)
    word: Word = "failed" if required else "note"
    if devices.driver is not None:
        text = f"driver {driver} is loaded, but no device is visible here"
        fix = "docker: --gpus all; podman: --device nvidia.com/gpu=all; Apptainer: --nv"
        return Finding(word, "GPU", text, fix)
    fix = "profiles smoke and mini need none, flux and flux-lora do"
    return Finding(word, "GPU", "none", "run it on a machine with a GPU" if required else fix)


def _memory() -> int:
    """Bytes of memory available to this process, including a container's limit."""
    memory = int(psutil.virtual_memory().total)
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no limit, or another cgroup version
            continue
    return memory


def check_memory(cores: int, memory: int) -> Finding:
    """Whether there is memory for the mini profile, whose workers use about 1 GiB each."""
    text = f"{cores} cores, {gibibytes(memory)} of memory"
    if memory < 4 * 2**30:
        fix = "provide 4 GiB or more, or run with `--jobs 1`"
        return Finding("warning", "machine", text, fix)
    return Finding("ok", "machine", text)


def locked_versions(lock: Path) -> dict[str, str]:
    """Names and versions in ``uv.lock``, without those that depend on the Python version.

    Empty if there is no such file.
    """
    try:
        packages = tomllib.loads(lock.read_text())["package"]
    except OSError:
        return {}
    counts = Counter(package["name"] for package in packages)
    return {
        package["name"]: package["version"]
        for package in packages
        if counts[package["name"]] == 1 and "registry" in package["source"]
    }


def _installed_versions() -> dict[str, str]:
    return {
        re.sub(r"[-_.]+", "-", distribution.name).lower(): distribution.version
        for distribution in importlib.metadata.distributions()
    }


def check_packages(locked: Mapping[str, str], installed: Mapping[str, str]) -> Finding:
    """Whether the installed packages are the locked ones, which the results were made with."""
    text = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}"
    if torch.cuda.is_available():
        text += f", cuDNN {torch.backends.cudnn.version()}"
        text += ", NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    text += "), " + ", ".join(f"{name} {installed.get(name, 'missing')}" for name in SHOWN[1:])
    if not locked:
        return Finding("note", "packages", f"{text}; no lock file to compare with")
    other = [
        f"{name} {installed[name]} (locked: {version})"
        for name, version in locked.items()
        if installed.get(name, version) != version
    ]
    if other:
        listed = ", ".join(other[:5]) + (", …" if len(other) > 5 else "")
        text += f"; {len(other)} differ from the lock: {listed}"
        return Finding("warning", "packages", text, "`make setup` installs the locked versions")
    return Finding("ok", "packages", f"{text}; all as locked")


def _check_code() -> Finding:
    """Whether results made here can record their commit."""
    commit, changed = git_state()
    if commit is None:
        fix = "run from a git checkout, or from an image that `make image` built"
        return Finding("warning", "code", "unknown commit: results cannot record it", fix)
    state = ", with uncommitted changes" if changed else ""
    return Finding("note" if changed else "ok", "code", f"commit {commit[:12]}{state}")


def _size(folder: Path) -> int:
    return int(psutil.disk_usage(str(folder)).total) if folder.is_dir() else 0


def check_shared_memory(size: int, gpus: int) -> Finding:
    """Whether there is shared memory for NCCL: Docker's default of 64 MiB is too little."""
    text = f"{gibibytes(size)} in {SHARED_MEMORY}"
    if size >= 2**30:
        return Finding("ok", "shared memory", text)
    if gpus < 2:
        return Finding("note", "shared memory", f"{text}, enough for one process")
    fix = "give the container at least 1 GiB (--shm-size 8g, or --ipc host)"
    return Finding("warning", "shared memory", text, fix)


def gibibytes(size: int) -> str:
    """A size in bytes as ``7.5 GiB`` or ``64 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def free_space(folder: Path) -> int | None:
    """Free bytes in ``folder``, or its nearest existing parent; None if it cannot be written to.

    It creates a temporary file, since permissions do not reveal a read-only mount.
    """
    places = (folder.absolute(), *folder.absolute().parents)
    existing = next(place for place in places if place.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".g2rpo-check-"):
            return int(psutil.disk_usage(str(existing)).free)
    except OSError:
        return None


def check_results(folder: Path) -> Finding:
    """Whether runs can write their results, and have enough space."""
    free = free_space(folder)
    if free is None:
        return Finding(
            "failed", "results", f"uid {os.getuid()} cannot write to {folder.absolute()}",
            'pass a folder of yours with --results; in a container, mount it: -v "$PWD/results:'
            '/work/results" --user "$(id -u):$(id -g)"',
        )  # fmt: skip
    text = f"{folder.absolute()}, {gibibytes(free)} free"
    if free < LITTLE:
        return Finding("warning", "results", text, "free some space, or pass another --results")
    places = (folder, folder / "runs", folder / "runs" / "submissions")
    shared = [str(path.absolute()) for path in places if path.is_dir() and writable_by_others(path)]
    if shared:
        text += f"; jobs load code from {shared[0]}, which other users can write to"
        return Finding("warning", "results", text, f"chmod go-w {' '.join(shared)}")
    return Finding("ok", "results", text)


def check_cache(folder: Path, missing: int, size: int) -> Finding:
    """Whether the weights of profile flux are in the Hugging Face cache, or can be fetched.

    ``missing`` artifacts of ``size`` bytes are not.
    """
    if not missing:
        return Finding("ok", "weights", f"{folder}: all weights of profile flux")
    text = f"{folder}: {missing} weights of profile flux missing, about {size / 1e9:.0f} GB"
    free = free_space(folder)
    if free is None:
        return Finding(
            "warning", "weights", f"{text}; uid {os.getuid()} cannot write there",
            "set HF_HOME to a folder of yours; in a container, mount it: "
            '-v "$HOME/.cache/huggingface:/cache/huggingface"',
        )  # fmt: skip
    if free < size:
        text += f", {gibibytes(free)} free"
        return Finding("note", "weights", text, "set HF_HOME to a folder on a larger disk")
    return Finding("note", "weights", text, "fetch them with `g2rpo weights fetch --profile flux`")
