"""The run's metrics: one JSON object per iteration, kept in step with the checkpoints."""

import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g2rpo.errors import UserError
from g2rpo.files import append_jsonl, atomic_write_bytes, atomic_write_text, remove

if TYPE_CHECKING:  # metrics are read on login nodes, without the model libraries
    from g2rpo.training.batch import TrainingBatch
    from g2rpo.training.clock import PhaseClock
    from g2rpo.training.rollout import Rollout
    from g2rpo.training.update import UpdateStatistics

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
MEASURED = ("reward/", "validation/")
"""Prefixes of measured values."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line cut short by a kill is ignored.

    Raises:
        UserError: another line is not a JSON object with an integer ``iteration``, or a measured
            value is not a finite number; names the file and the line number.
    """
    if not path.exists():
        return []
    lines = list(enumerate(path.read_bytes().splitlines(), start=1))
    lines = [(number, line) for number, line in lines if line.strip()]
    rows = []
    for number, line in lines:
        row = _row(line)
        if row is None:
            if number == lines[-1][0]:
                break
            raise _damage(path, number, "not a JSON object with an integer iteration")
        for name, value in row.items():
            if name.startswith(MEASURED) and not _is_finite(value):
                raise _damage(path, number, f"{name} is not a number")
        rows.append(row)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    """The row in ``line``; None if it is damaged."""
    try:
        row: Any = json.loads(line.decode())
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("iteration")) is int else None


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _damage(path: Path, number: int, what: str) -> UserError:
    return UserError(
        f"{path}, line {number}: {what}; delete that line, or the run folder to train again"
    )


class MetricsLog:
    """Appends rows to ``metrics.jsonl``.

    On resume, rows after the checkpoint's iteration are dropped, since those iterations run again.

    Attributes:
        validated: whether the last row of an earlier start has a validation.

    Raises:
        UserError: the file is damaged before its last line; it is left unchanged.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["iteration"] <= iteration]
        self.validated = any(key.startswith("validation/") for row in kept[-1:] for key in row)
        self._write(kept)

    def add_validation(self, values: Mapping[str, float]) -> None:
        """Adds a validation to the last row, or as the first row."""
        rows = read_metrics(self.path)
        rows = rows or [{"iteration": 0, "rollout_evaluations": 0, "seconds": 0.0}]
        self._write([*rows[:-1], {**rows[-1], **values}])

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one iteration's row, if this process holds the lease (:mod:`g2rpo.files`)."""
        append_jsonl(self.path, [row])


def keep_metrics(run: Path, checkpoint: Path) -> None:
    """Copies the metrics so far into a checkpoint being written."""
    if (run / METRICS_FILE).exists():
        shutil.copyfile(run / METRICS_FILE, checkpoint / METRICS_FILE)


def restore_metrics(run: Path, checkpoint: Path | None) -> None:
    """Restores the metrics of ``checkpoint``; deletes them if that is None.

    Checkpoints of older versions hold no metrics; the file is then left unchanged.
    """
    path = run / METRICS_FILE
    if checkpoint is None:
        remove(path)
        return
    if not (checkpoint / METRICS_FILE).exists():
        return
    kept = (checkpoint / METRICS_FILE).read_bytes()
    if not path.is_file() or not path.read_bytes().startswith(kept):
        logger.warning("%s: missing or damaged; restored from %s", path, checkpoint.name)
        remove(path)
    atomic_write_bytes(path, kept)


def iteration_sums(
    rollout: "Rollout",
    batch: "TrainingBatch",
    updates: Sequence["UpdateStatistics"],
    measured: Sequence["UpdateStatistics"],
    clock: "PhaseClock",
    evaluations: int = 1,
) -> dict[str, float]:
    """One rank's share of an iteration's costs and metrics, to be summed over ranks.

    ``measured`` are forwards and backwards beside those of the updates. Each velocity of a rollout
    takes ``evaluations`` of the transformer.
    """
    computed = (*updates, *measured)
    sums = {
        "rollout_evaluations": evaluations * rollout.velocity_evaluations,
        "reused_evaluations": evaluations * rollout.reused_evaluations,
        "images_scored": len(rollout.tree.images) * len(rollout.conditioning),
        "training_forwards": sum(part.forwards for part in computed),
        "training_backwards": sum(part.backwards for part in computed),
        "clipped": sum(update.clipped for update in updates),
        "transitions": sum(update.transitions for update in updates),
        "kl": sum(update.kl for update in updates),
        "loss": sum(update.loss for update in updates) / len(updates),
        "advantage": float(batch.advantage.abs().mean()),
        "device_seconds": clock.device_seconds,
        **{f"seconds/{phase}": seconds for phase, seconds in clock.phases.items()},
    }
    for name in rollout.rewards:
        values = rollout.group_rewards(name).double()
        logged = rollout.logged_rewards(name).double()
        sums |= {
            f"{name}/sum": float(values.sum()),
            f"{name}/count": values.numel(),
            f"{name}/group_std": float(rollout.group_stds(name).sum()),
            f"{name}/groups": values.numel() // values.shape[-1],
            f"{name}/logged_sum": float(logged.sum()),
            f"{name}/logged_count": logged.numel(),
        }
    return sums


def iteration_row(
    sums: Mapping[str, float], ranks: int, rewards: Iterable[str]
) -> dict[str, float]:
    """Means over ranks, transitions and groups, from the sums over all ranks.

    Raises:
        UserError: the mean of a reward is not finite.
    """
    row = {
        "loss": sums["loss"] / ranks,
        "clipped_fraction": sums["clipped"] / sums["transitions"],
        "kl": sums["kl"] / sums["transitions"],
        "advantage/absolute_mean": sums["advantage"] / ranks,
        **{k: seconds / ranks for k, seconds in sums.items() if k.startswith("seconds/")},
    }
    for name in rewards:
        means = {
            f"reward/{name}/mean": sums[f"{name}/sum"] / sums[f"{name}/count"],
            f"reward/{name}/group_std": sums[f"{name}/group_std"] / sums[f"{name}/groups"],
        }
        if sums[f"{name}/logged_count"]:
            anchor = sums[f"{name}/logged_sum"] / sums[f"{name}/logged_count"]
            means[f"reward/{name}/anchor"] = anchor
        if not all(math.isfinite(value) for value in means.values()):
            raise UserError(f"reward {name}: values too large to average; check that reward model")
        row |= means
    return row
