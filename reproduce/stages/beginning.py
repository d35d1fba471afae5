"""Starts a training from a checkpoint of a run that differs from it only in its length.

Such runs are identical up to the end of the shorter one, so a run that stops at some cost trains
only the iterations that none of the others has.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from g2rpo.checksums import write_document
from g2rpo.config import content_hash
from g2rpo.errors import UserError
from g2rpo.files import atomic_folder, atomic_write_bytes, sha256_file
from g2rpo.methods.base import RolloutShape, parse_method
from g2rpo.training.checkpoint.folder import (
    Progress,
    checkpoint_folder,
    iterations_in,
    problem,
    read_progress,
    saved_iterations,
)
from g2rpo.training.config import OptimizationConfig, TrainConfig
from g2rpo.training.metrics import METRICS_FILE
from reproduce.experiment import fingerprint
from reproduce.runs.folders import SETTINGS, listed, read_document, read_manifest, sound

logger = logging.getLogger(__name__)

BEGINNING = "beginning.json"
"""Names the run and the iteration that a run began from."""
LENGTH = ("iterations", "max_device_seconds", "max_equal_cost")


def begin_from_another(folder: Path, train: TrainConfig) -> None:
    """Copies the best checkpoint to begin from, with its metrics and images, if there is one.

    Only finished runs beside ``folder`` are looked at. At least one iteration is left to train, so
    that the run ends as it would have without them.

    Args:
        folder: the run's folder; one with checkpoints is left alone.
        train: its configuration.
    """
    if saved_iterations(folder):
        return
    wanted = without_length(fingerprint.train_inputs(train))
    usable = [
        (progress.iteration, run.name)
        for run in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"))
        if run != folder and _inputs(run) == wanted and _validated_alike(run, train)
        for progress in _sound_checkpoints(run)
        if _ends_later(train.optimization, progress)
    ]
    if not usable:
        return
    iteration, name = max(usable)
    source = checkpoint_folder(folder.parent / name, iteration)
    write_document(folder / BEGINNING, {"begun_from": {"run": name, "iteration": iteration}})
    for done in iterations_in(source.parents[1] / "images"):
        if done <= iteration:
            images = Path("images") / f"iteration-{done:06d}"
            shutil.copytree(source.parents[1] / images, folder / images, dirs_exist_ok=True)
    atomic_write_bytes(folder / METRICS_FILE, (source / METRICS_FILE).read_bytes())
    with atomic_folder(checkpoint_folder(folder, iteration)) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
    logger.warning("%s: begins with the first %d iterations of %s", folder.name, iteration, name)


def beginning_of(folder: Path) -> dict[str, Any]:
    """What :func:`begin_from_another` recorded; empty for a run from the first iteration."""
    found = read_document(folder / BEGINNING, ("begun_from",))
    return {} if found is None else {"begun_from": found["begun_from"]}


def refuse_other_validation(folder: Path, train: TrainConfig) -> None:
    """Refuses to resume a run whose learning curve would mix rewards of two validation sets.

    Raises:
        UserError: the iterations so far were validated otherwise.
    """
    before = listed(folder / SETTINGS, "validation")
    if before and train.validation and saved_iterations(folder):
        now = train.validation.model_dump(mode="json")
        if not _same_validation(before, now):
            shown = ", ".join(f"{key} {before.get(key)}" for key in ("file", "limit", "seed"))
            raise UserError(
                f"{folder}: its checkpoints were validated otherwise ({shown}); set `validation` "
                "back to that, or delete the folder to train again"
            )


def _validated_alike(run: Path, train: TrainConfig) -> bool:
    before = listed(run / SETTINGS, "validation")
    if not before or train.validation is None:
        return not before and train.validation is None
    return _same_validation(before, train.validation.model_dump(mode="json"))


def _same_validation(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two validations score the same images; how often does not matter."""
    if any(before.get(key) != now[key] for key in ("limit", "seed")):
        return False
    old, new = Path(before["file"]), Path(now["file"])
    if old.is_file() and new.is_file():
        return sha256_file(old) == sha256_file(new)
    return old.name == new.name  # the results were moved


def without_length(inputs: Mapping[str, Any]) -> str:
    """A hash of a run's inputs but for its length, schedules of the method written out."""
    optimization = inputs["optimization"]
    shape = RolloutShape(
        inputs["grid"]["steps"], inputs["rollout"]["group_size"], optimization["iterations"]
    )
    method = parse_method(inputs["method"]).with_resolved_schedule(shape)
    kept = {name: value for name, value in optimization.items() if name not in LENGTH}
    whole = {"optimization": kept, "method": method.model_dump(mode="json")}
    return content_hash({**inputs, **whole})


def _inputs(run: Path) -> str | None:
    """:func:`without_length` of a finished run; None for another, or one of an older version."""
    manifest = sound(read_manifest, run)
    try:
        return None if manifest is None else without_length(manifest["inputs"])
    except (KeyError, TypeError, ValueError, UserError):
        return None


def _sound_checkpoints(run: Path) -> Iterator[Progress]:
    for iteration in saved_iterations(run):
        folder = checkpoint_folder(run, iteration)
        if problem(folder) is None and (folder / METRICS_FILE).exists():
            yield read_progress(folder)


def _ends_later(length: OptimizationConfig, progress: Progress) -> bool:
    return progress.spent(length) < 1 and progress.iteration < length.iterations
