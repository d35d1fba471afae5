"""Checkpoints: whole or absent, safetensors only, the newest sound one is resumed from."""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file

from g2rpo.errors import UserError
from g2rpo.files import check_publication
from g2rpo.training.config import CheckpointConfig
from g2rpo.training.engine.optimizer import unpacked

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"iteration-(\d{6})")
FULL_DISK = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
"""safetensors tells an error of the system by its text alone."""
NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]


@dataclass
class Progress:
    """How far a run is, and what it has cost so far over all ranks.

    Attributes:
        iteration: iterations done.
        rollout_evaluations: velocity evaluations in rollouts.
        training_forwards: states that went through a training forward.
        training_backwards: states that went through a backward.
        images_scored: images that reward models were asked about (each image once).
        device_seconds: seconds times ranks.
        training_micro_batch: states per training forward, where memory ran out and it had to be
            made smaller than configured; else None.
        rollout_micro_batch: the same for states per velocity evaluation in rollouts.
        decode_images: the same for images decoded at once.
        reused_evaluations: those of the velocity evaluations that a step cache answered; None
            where there is none.
    """

    iteration: int = 0
    rollout_evaluations: int = 0
    training_forwards: int = 0
    training_backwards: int = 0
    images_scored: int = 0
    device_seconds: float = 0.0
    training_micro_batch: int | None = None
    rollout_micro_batch: int | None = None
    decode_images: int | None = None
    reused_evaluations: int | None = None


def checkpoint_folder(run: Path, iteration: int) -> Path:
    """Where the checkpoint after ``iteration`` iterations is kept."""
    return run / "checkpoints" / f"iteration-{iteration:06d}"


def saved_iterations(run: Path) -> list[int]:
    """The iterations that have a checkpoint, ascending."""
    found = (_FOLDER.fullmatch(path.name) for path in (run / "checkpoints").glob("iteration-*"))
    return sorted(int(match.group(1)) for match in found if match)


def is_sound(folder: Path) -> bool:
    """Whether every file that the checkpoint was written with is there in its full size."""
    try:
        sizes = json.loads((folder / "state.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def latest_checkpoint(run: Path) -> Path | None:
    """The newest sound checkpoint, or None; a damaged one is passed over with a warning."""
    for iteration in reversed(saved_iterations(run)):
        folder = checkpoint_folder(run, iteration)
        if is_sound(folder):
            return folder
        logger.warning("%s is damaged: resuming from the checkpoint before it", folder)
    return None


def save_optimizer(
    path: Path, optimizer: torch.optim.Optimizer, parameters: NamedParameters
) -> None:
    """Writes AdamW's state, each tensor under its parameter's name."""
    tensors = {}
    for name, parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = unpacked(value).contiguous()
    save_file(tensors, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file; :class:`UserError` where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; delete this checkpoint to use the one before") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete this checkpoint to use the one before"
        ) from None


def write_state(folder: Path, progress: Progress) -> None:
    """Closes a checkpoint: its counters and the sizes of its files."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    state = {"progress": asdict(progress), "files": files}
    (folder / "state.json").write_text(json.dumps(state, indent=2))


def read_progress(folder: Path) -> Progress:
    """The counters of a checkpoint."""
    return Progress(**json.loads((folder / "state.json").read_text())["progress"])


def prune(run: Path, config: CheckpointConfig) -> None:
    """Deletes the checkpoints that are not kept, where this process may."""
    iterations = saved_iterations(run)
    kept = set(iterations[-config.keep_last :])
    if config.keep_every is not None:
        kept.update(i for i in iterations if i % config.keep_every == 0)
    for iteration in sorted(set(iterations) - kept):
        _delete(checkpoint_folder(run, iteration))


def remove_unfinished(run: Path) -> None:
    """Deletes what a killed write left beside the checkpoints, where this process may.

    That of a process which has lost its lease and writes on can go too: it finds its temporary
    folder gone, and may not publish. A successor's cannot be hit: what was listed before the guards
    were asked is older than any successor.
    """
    for leftover in sorted((run / "checkpoints").glob(".iteration-*.tmp")):
        _delete(leftover)


def _delete(folder: Path) -> None:
    """Deletes a folder that was listed before; a part that cannot go now goes another time."""
    check_publication()
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        logger.warning("%s cannot be deleted altogether", folder)


@contextmanager
def writing(run: Path, what: str) -> Iterator[None]:
    """Around a write into the run folder: a full disk, and the like, is told in one line.

    Args:
        run: the run folder.
        what: is written, for the message.

    Raises:
        UserError: it could not be written; the checkpoints before it are as they were.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        text = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        full = any(word in str(error) for word in FULL_DISK)
        mend = "free space there (or raise the quota)" if full else "mend that"
        saved = saved_iterations(run)
        rest = "there is no checkpoint yet, so training begins anew"
        if saved:
            rest = f"{checkpoint_folder(run, saved[-1]).name} is intact, and training goes on there"
        raise UserError(
            f"{run}: {what} cannot be written ({text}); {mend} and run the same command again: "
            f"{rest}"
        ) from error
