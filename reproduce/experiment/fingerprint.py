"""Run folders: their names, what they were made from, and whether they are complete.

A run is named by a hash of its resolved configuration and of its inputs (prompt files, weights,
algorithm version), not of the device, the ranks or the micro-batch.
"""

import functools
import importlib.metadata
import os
import platform
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import psutil
import torch

from g2rpo.config import content_hash
from g2rpo.data.prompts import read_prompts
from g2rpo.errors import UserError
from g2rpo.files import FileState, file_state, sha256_file, sha256_files, sha256_tree
from g2rpo.hub.cache import Digests
from g2rpo.hub.lock import lock_path, revision_of
from g2rpo.policy import CheckpointConfig, PolicyConfig
from g2rpo.policy.checkpoint import files_at, find_checkpoint, local_path
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.unified_reward.template import question_inputs
from g2rpo.training.config import TrainConfig
from reproduce.experiment.settings import NOT_DETERMINING

ALGORITHM_VERSION = 1
"""Raised when the same configuration would give other weights or images than before."""

PACKAGES = (
    "g2rpo", "torch", "diffusers", "transformers", "accelerate", "open_clip_torch", "numpy",
)  # fmt: skip
REPOSITORY = Path(__file__).resolve().parents[2]


@functools.cache
def _folder_hash(folder: Path) -> str:
    return sha256_tree(folder)


@functools.cache
def _file_hash(path: Path) -> str:
    return sha256_file(path)


@functools.lru_cache(maxsize=1024)
def _resolved(source: str, device: int, inode: int) -> Path:
    # A path leads elsewhere when the folder that it is relative to changes: hence the other two.
    del device, inode
    return Path(source).resolve()


@functools.lru_cache(maxsize=1024)
def _pinned(source: str, lock: Path, state: FileState | None) -> str | None:
    del lock, state  # what is pinned can change with them
    return revision_of(source)


def source_fingerprint(source: str | None, revision: str | None) -> str | dict[str, str | None]:
    """What names the weights at ``source``: a hash of a local folder or file, else the hub id."""
    if source is None:
        return {"id": None, "revision": revision or None}
    try:
        found = Path(source).stat()
    except (OSError, ValueError):
        found = None
    if found is not None and stat.S_ISDIR(found.st_mode):
        return _folder_hash(_resolved(source, found.st_dev, found.st_ino))
    if found is not None and stat.S_ISREG(found.st_mode):
        return _file_hash(_resolved(source, found.st_dev, found.st_ino))
    lock = lock_path()
    pinned = _pinned(source, lock, file_state(lock)) if revision is None else None
    return {"id": source, "revision": revision or pinned}


def policy_inputs(config: PolicyConfig) -> dict[str, Any]:
    """The policy's configuration with its weights in place of their path."""
    settings = config.model_dump(mode="json", exclude={"source", "revision"})
    return settings | {"weights": source_fingerprint(config.source, config.revision)}


def reward_inputs(config: RewardConfig) -> dict[str, Any]:
    """A reward's configuration with its weights in place of their path."""
    settings = config.model_dump(
        mode="json", exclude={"source", "revision", "batch_size", "question"}
    )
    if config.question is not None:
        settings["question"] = question_inputs(config.question)
    return settings | {"weights": source_fingerprint(config.source, config.revision)}


def checkpoint_inputs(config: CheckpointConfig) -> str | dict[str, str | None]:
    """What names the weights of a checkpoint: their hash, or their place on the hub."""
    path = local_path(config)
    if path is None:
        return config.model_dump(mode="json") | {
            "revision": config.revision or revision_of(config.source)
        }
    try:
        return sha256_files(files_at(path, str(path)).weights, _file_hash)
    except UserError:  # told where the cell is run, so that other cells are
        return config.model_dump(mode="json")


def checkpoint_provenance(config: CheckpointConfig) -> tuple[str, str]:
    """Where the files of a checkpoint came from, and the SHA-256 of the weights in them."""
    files = find_checkpoint(config)
    if local_path(config) is not None:
        return files.label, sha256_files(files.weights, _file_hash)
    digests = Digests()
    return files.label, sha256_files(
        files.weights, lambda file: digests.known(file) or digests.measure(file)
    )


@functools.lru_cache(maxsize=256)
def _prompts_hash(path: Path, state: FileState | None) -> str:
    del state
    read_prompts(path)
    return sha256_file(path)


_absent_prompts: ContextVar[bool] = ContextVar("absent prompts are named", default=False)


@contextmanager
def absent_prompts_named() -> Iterator[None]:
    """Lets runs be named, for a plan, whose prompt files are not there yet."""
    token = _absent_prompts.set(True)
    try:
        yield
    finally:
        _absent_prompts.reset(token)


def prompts_hash(path: Path) -> str:
    """The SHA-256 of a prompt file; :class:`UserError` where it cannot be used."""
    if _absent_prompts.get() and not path.exists():
        return f"absent: {path}"
    # Thousands of cells share a file: it is read again only where it has changed.
    return _prompts_hash(path, file_state(path))


def train_inputs(config: TrainConfig) -> dict[str, Any]:
    """All that determines the trained weights."""
    settings = config.model_dump(
        mode="json", exclude={"policy", "prompts", "rewards", *NOT_DETERMINING}
    )
    prompts = {"sha256": prompts_hash(Path(config.prompts.file)), "limit": config.prompts.limit}
    rewards = {
        name: {"weight": term.weight, "reward": reward_inputs(term.reward)}
        for name, term in config.rewards.items()
    }
    # Weights that are computed with in bfloat16 were once stepped in it as well.
    stepped = {"stepped_in": "float32"} if config.policy.dtype == "bfloat16" else {}
    return {
        **settings,
        **stepped,
        "policy": policy_inputs(config.policy),
        "prompts": prompts,
        "rewards": rewards,
        "algorithm_version": ALGORITHM_VERSION,
    }


def train_run_name(config: TrainConfig) -> str:
    """The folder name of a training run, readable and unique."""
    rewards = "-".join(config.rewards)
    digest = content_hash(train_inputs(config))
    return f"{config.method.name}-{rewards}-seed{config.seed}-{digest}"


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


COMMIT_VARIABLE = "G2RPO_GIT_COMMIT"
"""The commit that a container image was built from; ``-dirty`` after it: not quite that one."""


@functools.cache
def git_state() -> tuple[str | None, bool | None]:
    """The commit of this repository and whether its code differs from it; None where unknown.

    Where there is no repository, as in a container image, :data:`COMMIT_VARIABLE` says it.
    """
    commit = _git("rev-parse", "HEAD")
    built_from = os.environ.get(COMMIT_VARIABLE)
    if commit is None and built_from:
        return built_from.removesuffix("-dirty"), built_from.endswith("-dirty")
    # Results are written while cells run; only other changes make a measurement "dirty".
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)results", ":(exclude)docs")
    return commit, None if changed is None else bool(changed)


def provenance(weights: dict[str, str]) -> dict[str, Any]:
    """Commit, packages, hardware and weights of what this process computes."""
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
