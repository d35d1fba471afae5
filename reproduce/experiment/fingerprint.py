"""Hashes that name runs and evaluations.

A run is named by a hash of its resolved configuration and its inputs (prompt files, weights,
algorithm version), whatever the device, the number of ranks or the micro-batch.
"""

import functools
from collections.abc import Iterator, Mapping
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
from g2rpo.rewards.server import ServerConfig
from g2rpo.rewards.unified_reward.template import question_inputs
from g2rpo.training.checkpoint.folder import CHECKPOINTS, STATE, newest_checkpoint
from g2rpo.training.config import TrainConfig
from reproduce.experiment.resolving import ResolvedCell
from reproduce.settings import NOT_DETERMINING

ALGORITHM_VERSION = 1
"""Incremented when the same configuration gives different weights or images than before."""

NOT_HASHED = {
    "training": NOT_DETERMINING,
    "policy": ("source", "revision"),
    "reward": ("source", "revision", "batch_size"),
    "evaluation": ("name",),
}
"""Settings that do not enter a hash: they do not change the result, or name files whose content is
hashed instead."""


def weights_name(config: PolicyConfig) -> str:
    """A hash that names the policy's weights."""
    weights = source_fingerprint(config.source, config.revision)
    return weights if isinstance(weights, str) else content_hash(weights)


def policy_inputs(config: PolicyConfig) -> dict[str, Any]:
    """The policy's configuration with a hash of its weights."""
    settings = config.model_dump(mode="json", exclude=set(NOT_HASHED["policy"]))
    return settings | {"weights": source_fingerprint(config.source, config.revision)}


def reward_inputs(config: RewardConfig) -> dict[str, Any]:
    """A reward's configuration with a hash of its weights."""
    apart = {"question", "server", *NOT_HASHED["reward"]}
    settings = config.model_dump(mode="json", exclude=apart)
    if config.question is not None:
        settings["question"] = question_inputs(config.question)
    if config.server is not None:
        settings["server"] = server_inputs(config.server)
    return settings | {"weights": source_fingerprint(config.source, config.revision)}


def server_inputs(server: ServerConfig) -> dict[str, Any]:
    """The model that a server of rewards reports, wherever the server is.

    Raises:
        UserError: the server does not answer.
    """
    from g2rpo.rewards.http import server_info  # slow: a client library

    try:
        found = server_info(server)
    except UserError:
        if _absent_inputs.get():
            return {"absent": server.url}
        raise
    return found.model_dump(include={"name", "version", "weights_hash", "template_hash"})


def checkpoint_run(config: CheckpointConfig) -> Path | None:
    """The run folder that a checkpoint names instead of weights, if it does."""
    path = local_path(config)
    return path if path is not None and (path / CHECKPOINTS).is_dir() else None


def checkpoint_inputs(config: CheckpointConfig) -> str | dict[str, str | None]:
    """The hash of a checkpoint's weights, or its place on the hub."""
    path, run = local_path(config), checkpoint_run(config)
    if path is None:
        return config.model_dump(mode="json") | {
            "revision": config.revision or revision_of(config.source)
        }
    try:
        if run is not None:
            return sha256_file(newest_checkpoint(run) / STATE)
        return sha256_files(files_at(path, str(path)).paths, file_hash)
    except UserError:  # reported when the cell runs, so that other cells can run
        return config.model_dump(mode="json")


def checkpoint_provenance(config: CheckpointConfig) -> tuple[str, str]:
    """The origin of a checkpoint's files, and the SHA-256 of its weights."""
    run = checkpoint_run(config)
    if run is not None:
        folder = newest_checkpoint(run)
        return f"{run.name}, {folder.name}", sha256_file(folder / STATE)
    files = find_checkpoint(config)
    of = Digests().of if local_path(config) is None else file_hash
    return files.label, sha256_files(files.paths, of)


@functools.lru_cache(maxsize=256)
def _prompts_hash(path: Path, state: FileState | None) -> str:
    del state
    read_prompts(path)
    return sha256_file(path)


_absent_inputs: ContextVar[bool] = ContextVar("absent_inputs", default=False)


@contextmanager
def absent_inputs_named() -> Iterator[None]:
    """Allows runs to be named, for a plan, before their prompt files exist or servers run."""
    token = _absent_inputs.set(True)
    try:
        yield
    finally:
        _absent_inputs.reset(token)


def prompts_hash(path: Path) -> str:
    """The SHA-256 of a prompt file.

    Raises:
        UserError: the file is missing or invalid.
    """
    if _absent_inputs.get() and not path.exists():
        return f"absent: {path}"
    # Thousands of cells share a file, so it is only read again if it changed.
    return _prompts_hash(path, file_state(path))


FIRST_KEYS = {
    "approximate_rollout": "continuations",
    "granularity_reduction": "fusion",
    "update_every": "optimizer_step",
}
FIRST_VALUES = {"update_every": {"timestep": "per_step", "iteration": "per_iteration"}}
"""Names of settings when the first runs were hashed. Hashes use them, so that renaming a setting
does not rename existing runs."""


def _first_named(settings: dict[str, Any]) -> dict[str, Any]:
    def first(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _first_named(value)
        return FIRST_VALUES[key][value] if key in FIRST_VALUES else value

    return {FIRST_KEYS.get(key, key): first(key, value) for key, value in settings.items()}


def train_inputs(config: TrainConfig) -> dict[str, Any]:
    """Everything that determines the trained weights."""
    apart = {"policy", "prompts", "rewards"}
    settings = config.model_dump(mode="json", exclude=apart | set(NOT_HASHED["training"]))
    prompts = {"sha256": prompts_hash(Path(config.prompts.file)), "limit": config.prompts.limit}
    rewards = {
        name: {"weight": term.weight, "reward": reward_inputs(term.reward)}
        for name, term in config.rewards.items()
    }
    # Older versions also stepped bfloat16 weights in bfloat16.
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
    """The readable, unique folder name of a training run."""
    rewards = "-".join(config.rewards)
    digest = content_hash(train_inputs(config))
    return f"{config.title}-{rewards}-seed{config.seed}-{digest}"


def evaluation_inputs(cell: ResolvedCell) -> dict[str, Any]:
    """Everything that determines the held-out images of a trained policy."""
    protocol = cell.evaluation.model_dump(mode="json", exclude=set(NOT_HASHED["evaluation"]))
    return {
        "protocol": protocol,
        "policy": policy_inputs(cell.policy),
        "prompts": prompts_hash(Path(cell.evaluation_prompts)),
        "algorithm_version": ALGORITHM_VERSION,
    }


def protocol_hash(inputs: Mapping[str, Any]) -> str:
    """Names the protocol and prompts of :func:`evaluation_inputs`, whatever the policy."""
    return content_hash({key: inputs[key] for key in ("protocol", "prompts")})
