"""The folders that runs write to and read from: results, caches, free space."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil

from g2rpo.files import writable_by_others
from reproduce.checks.finding import Finding, gibibytes

LITTLE = 5 * 2**30
"""Free bytes below which a table's runs may not fit."""


def existing(folder: Path) -> Path:
    """``folder``, or the nearest folder above it that exists."""
    for candidate in (folder, *folder.absolute().parents):
        if candidate.is_dir():
            return candidate
    return Path("/")


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
            "results", "failed", f"{folder.absolute()} cannot be written by uid {os.getuid()}",
            'give a folder of yours: --results FOLDER, or in a container -v "$PWD/results:'
            '/work/results" with --user "$(id -u):$(id -g)"',
        )  # fmt: skip
    free = psutil.disk_usage(str(existing(folder))).free
    text = f"{folder.absolute()}, {gibibytes(free)} free"
    if free < LITTLE:
        return Finding("results", "warning", text, "free some space, or give another --results")
    places = (folder, folder / "runs", folder / "runs" / "submissions")
    shared = [str(path.absolute()) for path in places if path.is_dir() and writable_by_others(path)]
    if shared:
        text += f"; jobs load code from {shared[0]}, which others can write to"
        return Finding("results", "warning", text, f"chmod go-w {' '.join(shared)}")
    return Finding("results", "ok", text)


def check_cache(folder: Path, wanted: Iterable[tuple[str, int | None]]) -> Finding:
    """Whether published weights can be fetched into the Hugging Face cache.

    Args:
        folder: the cache.
        wanted: name and bytes of what the profile flux needs and is not cached yet.
    """
    missing = list(wanted)
    if not missing:
        return Finding("weights", "ok", f"{folder}: all of the profile flux")
    size = sum(bytes_ or 0 for _, bytes_ in missing)
    text = f"{folder}: {len(missing)} of the profile flux are missing, about {size / 1e9:.0f} GB"
    if not writable(folder):
        return Finding(
            "weights", "warning", f"{text}, and uid {os.getuid()} cannot write there",
            "set HF_HOME to a folder of yours, or in a container "
            '-v "$HOME/.cache/huggingface:/cache/huggingface"',
        )  # fmt: skip
    free = psutil.disk_usage(str(existing(folder))).free
    if free < size:
        return Finding(
            "weights", "note", f"{text}, with {gibibytes(free)} free",
            "set HF_HOME to a larger disk before fetching them",
        )  # fmt: skip
    return Finding("weights", "note", text, "`g2rpo weights fetch --profile flux` fetches them")


def missing_weights(profile: str = "flux") -> list[tuple[str, int | None]]:
    """Name and bytes of a profile's published weights that are not whole in the cache."""
    from g2rpo.hub.catalogue import catalogue
    from g2rpo.hub.lock import read_lock
    from g2rpo.hub.status import artifact_state
    from reproduce.commands.weights import WEIGHTS, needed_by_profile

    lock = read_lock()
    needed = needed_by_profile(profile, catalogue().select([], WEIGHTS))
    return [
        (artifact.name, artifact.size()[0])
        for artifact in needed
        if artifact_state(artifact, lock).word not in ("locked", "cached")
    ]
