"""The origin of a result: commit, packages, hardware, and fingerprints of weights."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from g2rpo.files import FileState, file_state, sha256_file, sha256_tree
from g2rpo.hub.lock import lock_path, revision_of

PACKAGES = (
    "g2rpo", "torch", "diffusers", "transformers", "accelerate", "open_clip_torch", "numpy",
)  # fmt: skip
REPOSITORY = Path(__file__).resolve().parents[1]
COMMIT_VARIABLE = "G2RPO_GIT_COMMIT"
"""The commit of a container image; the suffix ``-dirty`` marks uncommitted changes."""


@functools.cache
def _folder_hash(folder: Path) -> str:
    return sha256_tree(folder)


@functools.cache
def file_hash(path: Path) -> str:
    """The SHA-256 of a weights file, read once per process."""
    return sha256_file(path)


@functools.lru_cache(maxsize=1024)
def _pinned(source: str, lock: Path, state: FileState | None) -> str | None:
    del lock, state  # part of the key
    return revision_of(source)


def source_fingerprint(source: str | None, revision: str | None) -> str | dict[str, str | None]:
    """Identifies the weights at ``source``: a hash of a local folder or file, else the hub id."""
    if source is None:
        return {"id": None, "revision": revision or None}
    path = Path(source)
    if path.is_dir():
        return _folder_hash(path.resolve())
    if path.is_file():
        return file_hash(path.resolve())
    lock = lock_path()
    pinned = _pinned(source, lock, file_state(lock)) if revision is None else None
    return {"id": source, "revision": revision or pinned}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


CODE = ("g2rpo", "reproduce", "benchmarks", "slurm", "pyproject.toml", "uv.lock")
"""What results depend on; other changes do not make them dirty."""


@functools.cache
def git_state() -> tuple[str | None, bool | None]:
    """The commit of this repository and whether it has uncommitted changes; None if unknown.

    Without a repository, as in a container image, :data:`COMMIT_VARIABLE` is used.
    """
    commit = _git("rev-parse", "HEAD")
    built_from = os.environ.get(COMMIT_VARIABLE)
    if commit is None and built_from:
        return built_from.removesuffix("-dirty"), built_from.endswith("-dirty")
    changed = _git("status", "--porcelain", "--", *CODE)
    return commit, None if changed is None else bool(changed)


def provenance(weights: dict[str, str]) -> dict[str, Any]:
    """Commit, packages, hardware and weights of this process's results."""
    import torch  # imported late: plans use the hashes of this module

    commit, dirty = git_state()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "weights": weights,
        "hardware": {
            "device": gpu or "cpu",
            "machine": platform.machine(),
            "cores": str(os.cpu_count()),
            "threads": str(torch.get_num_threads()),
            "memory_gib": str(round(psutil.virtual_memory().total / 2**30)),
            "python": platform.python_version(),
        },
    }
