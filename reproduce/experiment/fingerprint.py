"""Run folders: their names, what they were made from, and whether they are complete.

A run is named by a hash of its resolved configuration and of its inputs (prompt files, weights,
algorithm version), not of the device, the ranks or the micro-batch.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from g2rpo.config import content_hash
from g2rpo.data.prompts import read_prompts
from g2rpo.errors import UserError
from g2rpo.files import FileState, file_state, sha256_file, sha256_files
from g2rpo.hub.cache import Digests
from g2rpo.hub.lock import revision_of
from g2rpo.policy import CheckpointConfig, PolicyConfig
from g2rpo.policy.checkpoint import files_at, find_checkpoint, local_path
from g2rpo.provenance import file_hash, source_fingerprint
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.unified_reward.template import question_inputs
from g2rpo.training.config import TrainConfig
from reproduce.settings import NOT_DETERMINING

ALGORITHM_VERSION = 1
"""Raised when the same configuration would give other weights or images than before."""


def weights_name(config: PolicyConfig) -> str:
    """A hash that names the policy's weights."""
    found = source_fingerprint(config.source, config.revision)
    return found if isinstance(found, str) else content_hash(found)


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
        return sha256_files(files_at(path, str(path)).weights, file_hash)
    except UserError:  # told where the cell is run, so that other cells are
        return config.model_dump(mode="json")


def checkpoint_provenance(config: CheckpointConfig) -> tuple[str, str]:
    """Where the files of a checkpoint came from, and the SHA-256 of the weights in them."""
    files = find_checkpoint(config)
    if local_path(config) is not None:
        return files.label, sha256_files(files.weights, file_hash)
    digests = Digests()
    return files.label, sha256_files(files.weights, digests.of)


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


FIRST_KEYS = {
    "approximate_rollout": "continuations",
    "granularity_reduction": "fusion",
    "update_every": "optimizer_step",
}
FIRST_VALUES = {"update_every": {"timestep": "per_step", "iteration": "per_iteration"}}
"""What settings were called when the first runs were named. Hashes are of these names, so that
runs are still found after a setting has been renamed."""


def _first_named(settings: dict[str, Any]) -> dict[str, Any]:
    def first(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _first_named(value)
        return FIRST_VALUES[key][value] if key in FIRST_VALUES else value

    return {FIRST_KEYS.get(key, key): first(key, value) for key, value in settings.items()}


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
        **_first_named(settings),
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
