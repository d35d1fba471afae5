"""Checks the folders of results and published weights, and their free space."""

import os
import tempfile
from pathlib import Path

import psutil

from g2rpo.files import writable_by_others
from slurm.checks.finding import Finding

LITTLE = 5 * 2**30
"""Free bytes below which the runs of a table may not fit."""


def gibibytes(size: int) -> str:
    """A size in bytes as ``7.5 GiB`` or ``64 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def existing(folder: Path) -> Path:
    """``folder``, or its nearest existing parent."""
    folders = (folder, *folder.absolute().parents)
    return next((candidate for candidate in folders if candidate.is_dir()), Path("/"))


def writable(folder: Path) -> bool:
    """Whether files can be created in ``folder``, or in its nearest existing parent.

    It creates a temporary file, since permissions do not reveal a read-only mount.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=existing(folder), prefix=".g2rpo-check-"):
            return True
    except OSError:
        return False


def check_results(folder: Path) -> Finding:
    """Whether runs can write their results, and have enough space."""
    if not writable(folder):
        return Finding(
            "failed", "results", f"uid {os.getuid()} cannot write to {folder.absolute()}",
            'pass a folder of yours with --results; in a container, mount it: -v "$PWD/results:'
            '/work/results" --user "$(id -u):$(id -g)"',
        )  # fmt: skip
    free = psutil.disk_usage(str(existing(folder))).free
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
    """Whether the weights of profile flux are cached, or can be fetched.

    Args:
        folder: the Hugging Face cache.
        missing: number of artifacts that are not cached.
        size: their size in bytes.
    """
    if not missing:
        return Finding("ok", "weights", f"{folder}: all weights of profile flux")
    text = f"{folder}: {missing} weights of profile flux missing, about {size / 1e9:.0f} GB"
    if not writable(folder):
        return Finding(
            "warning", "weights", f"{text}; uid {os.getuid()} cannot write there",
            "set HF_HOME to a folder of yours; in a container, mount it: "
            '-v "$HOME/.cache/huggingface:/cache/huggingface"',
        )  # fmt: skip
    free = psutil.disk_usage(str(existing(folder))).free
    if free < size:
        text += f", {gibibytes(free)} free"
        return Finding("note", "weights", text, "set HF_HOME to a folder on a larger disk")
    return Finding("note", "weights", text, "fetch them with `g2rpo weights fetch --profile flux`")
