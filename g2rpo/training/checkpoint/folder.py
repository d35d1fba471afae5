"""The folders of checkpoints: complete or absent, with checksums. Runs resume from the newest.

Nothing here imports a model library, since runs are listed on login nodes.
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from g2rpo.checksums import FILES, checksums_of, parse_document, problems, write_document
from g2rpo.errors import UserError
from g2rpo.files import check_publication

if TYPE_CHECKING:
    from g2rpo.training.config import CheckpointConfig, OptimizationConfig

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"iteration-(\d{6,})")
FULL_DISK = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
"""safetensors reports a system error only by its text."""
CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints."""
SHARDS = "shards"
"""The folder of a sharded checkpoint that holds every rank's part."""
STATE = "state.json"
"""The file that completes a checkpoint."""
COUNTED = ("rollout_evaluations", "training_forwards", "training_backwards", "images_scored")
"""The integer costs of :class:`Progress`."""


def equal_cost(costs: Any) -> Any:
    """The cost in velocity evaluations, where costs are to be equal; a backward counts as two.

    ``costs`` has the three counts as numbers, or as columns of a table.
    """
    return costs.rollout_evaluations + costs.training_forwards + 2 * costs.training_backwards


@dataclass
class Progress:
    """How far a run is, and its cost so far over all ranks.

    Attributes:
        iteration: iterations done.
        rollout_evaluations: velocity evaluations (NFE) in rollouts.
        training_forwards: states that went through a forward in training.
        training_backwards: states that went through a backward.
        images_scored: images scored by reward models (each image counts once).
        device_seconds: seconds times ranks.
        training_micro_batch: states per training forward, if running out of memory has reduced it
            below the configured size; else None.
        rollout_micro_batch: the same for states per velocity evaluation in rollouts.
        decode_images: the same for images decoded at once.
        reused_evaluations: velocity evaluations answered by a step cache; None without one.
        measurements: what an adaptive method has measured; None without one.
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
    measurements: dict[str, float] | None = None

    @property
    def equal_cost_evaluations(self) -> int:
        """See :func:`equal_cost`."""
        return int(equal_cost(self))

    def spent(self, settings: "OptimizationConfig") -> float:
        """The share of its limit on cost that the run has used; 0 without a limit."""
        limits = (
            (self.device_seconds, settings.max_device_seconds),
            (self.equal_cost_evaluations, settings.max_equal_cost),
        )
        return max(0.0 if limit is None else cost / limit for cost, limit in limits)

    def advance(self, sums: Mapping[str, float], *, step_cache: bool) -> None:
        """Counts one more iteration with the costs ``sums`` over all ranks, by field."""
        self.iteration += 1
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + round(sums[name]))
        self.device_seconds += sums["device_seconds"]
        if step_cache:
            self.reused_evaluations = (self.reused_evaluations or 0) + round(
                sums["reused_evaluations"]
            )


def checkpoint_folder(run: Path, iteration: int) -> Path:
    """The folder of the checkpoint after ``iteration`` iterations."""
    return run / CHECKPOINTS / f"iteration-{iteration:06d}"


def iterations_in(folder: Path) -> list[int]:
    """The numbers of the subfolders ``iteration-<number>``, ascending."""
    matches = (_FOLDER.fullmatch(path.name) for path in folder.glob("iteration-*"))
    return sorted(int(match[1]) for match in matches if match)


def saved_iterations(run: Path) -> list[int]:
    """The iterations that have a checkpoint, ascending."""
    return iterations_in(run / CHECKPOINTS)


def problem(folder: Path, part: slice = slice(None)) -> str | None:
    """What is wrong with a checkpoint, in a few words that name the file; None if it is sound.

    ``part``: which of its files to check, ordered by name, so that ranks can share the work.
    """
    try:
        state = read_state(folder)
        files = dict(sorted(state[FILES].items())[part])
        damage = next(problems(folder, files), None)
        for metadata in folder.glob("*/.metadata"):  # a pickle: never load it unchecked
            entry = state[FILES].get(os.path.relpath(metadata, folder))
            if not isinstance(entry, dict):
                return f"{os.path.relpath(metadata, folder)} has no recorded SHA-256"
    except (FileNotFoundError, NotADirectoryError):
        return f"{STATE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE} is damaged ({error})"
    return None if damage is None else f"{os.path.relpath(damage[0], folder)} {damage[1]}"


def latest_checkpoint(run: Path, check: Callable[[Path], str | None] = problem) -> Path | None:
    """The newest undamaged checkpoint, or None; a warning names each damaged one.

    ``check`` is :func:`problem`, or its counterpart over several ranks.
    """
    iterations = saved_iterations(run)
    for iteration in reversed(iterations):
        folder = checkpoint_folder(run, iteration)
        damage = check(folder)
        if damage is None:
            return folder
        logger.warning("%s: %s; trying the checkpoint before it", folder, damage)
    if iterations:
        logger.warning("%s: no undamaged checkpoint left; training starts over", run)
    return None


def newest_checkpoint(run: Path) -> Path:
    """The checkpoint that holds the result of ``run``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    iterations = saved_iterations(run)
    if not iterations:
        raise UserError(f"{run}: no checkpoint; train this cell first")
    folder = checkpoint_folder(run, iterations[-1])
    damage = problem(folder)
    if damage is not None:  # the checkpoint before it holds another policy than the run's result
        raise UserError(f"{folder}: {damage}; train this cell again to repair it")
    return folder


def write_state(
    folder: Path, progress: Progress, measured: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Completes a checkpoint with its counters and the checksums of its files.

    ``measured`` are the checksums already known (:func:`g2rpo.checksums.checksums_of`).
    """
    files = dict(measured or {})
    known = {folder / name for name in files}
    files |= checksums_of({p for p in folder.rglob("*") if p.is_file()} - known, folder)
    write_document(folder / STATE, {"progress": asdict(progress), FILES: files})


def read_state(folder: Path) -> dict[str, Any]:
    """Reads what :func:`write_state` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    return parse_document((folder / STATE).read_bytes())


def read_progress(folder: Path) -> Progress:
    """The counters of a checkpoint."""
    return Progress(**read_state(folder)["progress"])


def prune(run: Path, config: "CheckpointConfig", newest: int | None = None) -> None:
    """Deletes the checkpoints that are not kept, if this process still holds the lease.

    Those after ``newest``, which was just written, are damaged leftovers of an earlier start.
    """
    iterations = saved_iterations(run)
    kept = config.kept([i for i in iterations if newest is None or i <= newest])
    for iteration in sorted(set(iterations) - kept):
        _delete(checkpoint_folder(run, iteration))


def remove_unfinished(run: Path) -> None:
    """Deletes what killed writes left beside the checkpoints, if this process holds the lease.

    The temporary folder of a process that has lost its lease may go too: it may not publish anyway.
    A successor's is safe: the folders were listed before the lease was checked.
    """
    for leftover in sorted((run / CHECKPOINTS).glob(".iteration-*.tmp")):
        _delete(leftover)


def _delete(folder: Path) -> None:
    """Deletes a folder; parts that cannot be deleted now are deleted another time."""
    check_publication()
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        logger.warning("%s: cannot be deleted completely", folder)


@contextmanager
def writing(run: Path, what: str) -> Iterator[None]:
    """Turns a disk error while writing ``what`` into the run folder into a one-line error.

    Raises:
        UserError: it cannot be written; earlier checkpoints stay intact.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        text = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        full = any(word in str(error) for word in FULL_DISK)
        fix = "free space or raise the quota" if full else "fix that"
        saved = saved_iterations(run)
        rest = "there is no checkpoint yet, so training starts over"
        if saved:
            rest = f"{checkpoint_folder(run, saved[-1]).name} is intact, so training resumes there"
        raise UserError(
            f"{run}: {what} cannot be written ({text}); {fix} and run the same command again "
            f"({rest})"
        ) from error
