"""The folders that runs write to and read from: results, caches, free space."""

import os
import tempfile
from pathlib import Path

import psutil

from g2rpo.files import writable_by_others
from slurm.checks.finding import Finding

LITTLE = 5 * 2**30
"""Free bytes below which a table's runs may not fit."""


def gibibytes(size: int) -> str:
    """Bytes for people: ``7.5 GiB``, ``64 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def existing(folder: Path) -> Path:
    """``folder``, or the nearest folder above it that exists."""
    folders = (folder, *folder.absolute().parents)
    return next((candidate for candidate in folders if candidate.is_dir()), Path("/"))


def writable(folder: Path) -> bool:
    """Whether a file can be made in ``folder``, or the folder itself where it is not there yet.

    A file is really made: permissions alone do not tell of a mount that is read-only.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=existing(folder), prefix=".g2rpo-check-"):
            return True
    except OSError:
        return False


def check_results(folder: Path) -> Finding:
    """Whether runs can write their results, and have room for them."""
    if not writable(folder):
        return Finding(
            "failed", "results", f"{folder.absolute()} cannot be written by uid {os.getuid()}",
            'give a folder of yours: --results FOLDER, or in a container -v "$PWD/results:'
            '/work/results" with --user "$(id -u):$(id -g)"',
        )  # fmt: skip
    free = psutil.disk_usage(str(existing(folder))).free
    text = f"{folder.absolute()}, {gibibytes(free)} free"
    if free < LITTLE:
        return Finding("warning", "results", text, "free some space, or give another --results")
    places = (folder, folder / "runs", folder / "runs" / "submissions")
    shared = [str(path.absolute()) for path in places if path.is_dir() and writable_by_others(path)]
    if shared:
        text += f"; jobs load code from {shared[0]}, which others can write to"
        return Finding("warning", "results", text, f"chmod go-w {' '.join(shared)}")
    return Finding("ok", "results", text)


def check_cache(folder: Path, missing: int, size: int) -> Finding:
    """Whether published weights can be fetched into the Hugging Face cache.

    Args:
        folder: the cache.
        missing: how many that the profile flux needs are not cached yet.
        size: their bytes.
    """
    if not missing:
        return Finding("ok", "weights", f"{folder}: all of the profile flux")
    text = f"{folder}: {missing} of the profile flux are missing, about {size / 1e9:.0f} GB"
    if not writable(folder):
        return Finding(
            "warning", "weights", f"{text}, and uid {os.getuid()} cannot write there",
            "set HF_HOME to a folder of yours, or in a container "
            '-v "$HOME/.cache/huggingface:/cache/huggingface"',
        )  # fmt: skip
    free = psutil.disk_usage(str(existing(folder))).free
    if free < size:
        text += f", with {gibibytes(free)} free"
        return Finding("note", "weights", text, "set HF_HOME to a larger disk before fetching them")
    return Finding("note", "weights", text, "`g2rpo weights fetch --profile flux` fetches them")
