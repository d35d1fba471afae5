"""Two rows of a table compared in scores and metrics, and what that says of reward hacking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.evaluation.metrics import DISTANCE, VENDI
from benchmarks.evaluation.results import RowScores
from benchmarks.evaluation.statistics import (
    ALPHA,
    MIN_SEEDS,
    Comparison,
    Interval,
    Label,
    checkpoint_comparisons,
    checkpoint_improvements,
    holm,
    method_comparisons,
    method_improvements,
)

DIVERSITY = (DISTANCE, VENDI)
"""Metrics whose fall counts against a row; how far it drifted is neither good nor bad."""


def strongest_label(first: RowScores, second: RowScores) -> Label:
    """``method`` where two rows share three seeds, or where one has three and the other is a model
    without seeds; else ``checkpoint``."""
    if not first.seeds or not second.seeds:
        seeds = max(len(first.seeds), len(second.seeds))
    else:
        seeds = len(set(first.seeds) & set(second.seeds))
    return "method" if seeds >= MIN_SEEDS else "checkpoint"


def compare_rows(
    first: RowScores, second: RowScores, rewards: Sequence[str], label: Label
) -> list[Comparison]:
    """Compares two rows of a table in several score columns.

    Args:
        first: one row.
        second: a row scored on the same prompts.
        rewards: the score columns; both rows have them.
        label: ``method`` pairs the means of shared seeds. ``checkpoint`` pairs the prompts, each
            averaged over the shared seeds, or over each row's own seeds when they share none.

    Returns:
        One comparison (first - second) for each reward.

    Raises:
        ValueError: ``method``, though the rows share fewer than three seeds.
    """
    shared = _shared_seeds(first, second, label)
    return _compare(first.scores(rewards, shared), second.scores(rewards, shared), label)


def improvements(
    first: RowScores, second: RowScores, rewards: Sequence[str], label: Label
) -> list[Interval]:
    """How likely ``first`` scores higher than ``second`` on a prompt, for each reward.

    Arguments are those of :func:`compare_rows`. Trainings are paired by shared seeds; where the
    rows share none, every training of ``first`` meets every one of ``second``.
    """
    shared = _shared_seeds(first, second, label)
    one, two = first.scores(rewards, shared), second.scores(rewards, shared)
    if shared is None:
        cells = one.shape[1], two.shape[1]
        one, two = np.repeat(one, cells[1], axis=1), np.tile(two, (1, cells[0], 1))
    return (method_improvements if label == "method" else checkpoint_improvements)(one, two)


def compare_metric(
    first: RowScores, second: RowScores, metric: str, label: Label
) -> Comparison | None:
    """Compares two rows in one metric, as :func:`compare_rows` does in scores.

    Returns:
        first - second, or None where the two were not measured on the same prompts.
    """
    if metric not in first.metrics or metric not in second.metrics:
        return None
    shared = _shared_seeds(first, second, label)
    (one, prompts), (two, others) = (row.metric(metric, shared) for row in (first, second))
    return _compare(one, two, label)[0] if prompts == others else None


def _shared_seeds(first: RowScores, second: RowScores, label: Label) -> list[int] | None:
    if label == "method" and strongest_label(first, second) != "method":
        raise ValueError(f"rows {first.row!r} and {second.row!r} share too few seeds")
    return sorted(set(first.seeds) & set(second.seeds)) or None


def _compare(
    one: npt.NDArray[np.float64], two: npt.NDArray[np.float64], label: Label
) -> list[Comparison]:
    """Comparisons of [quantities, cells, prompts] with another such array."""
    if label == "checkpoint":
        return checkpoint_comparisons(one.mean(axis=1), two.mean(axis=1))
    return method_comparisons(*np.broadcast_arrays(one.mean(axis=2), two.mean(axis=2)))


@dataclass(frozen=True)
class Hacking:
    """Whether a row looks like reward hacking: what it trains on rose while something else fell.

    Attributes:
        rose: in-domain rewards significantly above the baseline.
        fell: out-of-domain rewards and measures of diversity significantly below it.
    """

    rose: tuple[str, ...]
    fell: tuple[str, ...]

    @property
    def flagged(self) -> bool:
        """Whether both happened."""
        return bool(self.rose and self.fell)


def judge_hacking(
    row: RowScores, baseline: RowScores | None, rewards: Sequence[str], label: Label
) -> Hacking | None:
    """Compares a trained row with the baseline in the table's rewards and in diversity.

    The p-values of one row are corrected together by Holm's procedure.

    Args:
        row: the trained row.
        baseline: the untrained model; None where the table has none.
        rewards: the table's score columns.
        label: what the table's intervals of the row are about.

    Returns:
        None where it cannot be judged: no baseline, one under another protocol, too few shared
        seeds for the label, or no training reward among the columns.
    """
    if baseline is None or not _comparable(row, baseline, label):
        return None
    trained = row.cells[0].info.train_rewards
    known = [name for name in rewards if name in row.rewards and name in baseline.rewards]
    if not set(trained) & set(known):
        return None
    compared: dict[str, Comparison] = dict(
        zip(known, compare_rows(row, baseline, known, label), strict=True)
    )
    for metric in DIVERSITY:
        found = compare_metric(row, baseline, metric, label)
        if found is not None:
            compared[metric] = found
    signs = _significant(compared)
    return Hacking(
        rose=tuple(name for name, sign in signs.items() if sign > 0 and name in trained),
        fell=tuple(name for name, sign in signs.items() if sign < 0 and name not in trained),
    )


def _comparable(row: RowScores, baseline: RowScores, label: Label) -> bool:
    first, second = row.cells[0].info, baseline.cells[0].info
    return (
        row.row != baseline.row
        and first.protocol == second.protocol
        and row.prompt_ids == baseline.prompt_ids
        and strongest_label(row, baseline) == label
    )


def _significant(compared: Mapping[str, Comparison]) -> dict[str, int]:
    """The sign of each difference whose corrected p-value is below :data:`ALPHA`."""
    adjusted = holm([one.p_value for one in compared.values()])
    return {
        name: int(np.sign(one.difference))
        for (name, one), p_value in zip(compared.items(), adjusted, strict=True)
        if p_value < ALPHA
    }
