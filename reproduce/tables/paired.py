"""Two rows of a table compared in scores and metrics, and what that says of reward hacking."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

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
    corrected,
    method_comparisons,
    method_improvements,
)
from reproduce.tables.model import RewardHacking

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


def alike(first: RowScores, second: RowScores) -> bool:
    """Whether two rows were evaluated under one protocol on the same prompts."""
    return first.protocol == second.protocol and first.prompt_ids == second.prompt_ids


def compare_rows(
    first: RowScores, second: RowScores, rewards: Sequence[str]
) -> dict[str, Comparison]:
    """Compares two rows of a table in those of the score columns that both have.

    Under the label ``method`` the means of shared seeds are paired. Under ``checkpoint`` the
    prompts are, each averaged over the shared seeds, or over each row's own where they share none.

    Args:
        first: one row.
        second: a row scored on the same prompts.
        rewards: the score columns.

    Returns:
        The comparison (first - second) by reward.
    """
    known, shared = _shared(first, second, rewards)
    found = _compare(first.scores(known, shared), second.scores(known, shared), first, second)
    return dict(zip(known, found, strict=True))


def improvements(
    first: RowScores, second: RowScores, rewards: Sequence[str]
) -> dict[str, Interval]:
    """How likely ``first`` scores higher than ``second`` on a prompt, by reward.

    Arguments are those of :func:`compare_rows`. Trainings are paired by shared seeds; where the
    rows share none, every training of ``first`` meets every one of ``second``.
    """
    known, shared = _shared(first, second, rewards)
    one, two = first.scores(known, shared), second.scores(known, shared)
    if shared is None:
        cells = one.shape[1], two.shape[1]
        one, two = np.repeat(one, cells[1], axis=1), np.tile(two, (1, cells[0], 1))
    method = strongest_label(first, second) == "method"
    found = (method_improvements if method else checkpoint_improvements)(one, two)
    return dict(zip(known, found, strict=True))


def compare_metric(first: RowScores, second: RowScores, metric: str) -> Comparison | None:
    """Compares two rows in one metric, as :func:`compare_rows` does in scores.

    Returns:
        first - second, or None where the two were not measured on the same prompts.
    """
    if metric not in first.metrics or metric not in second.metrics:
        return None
    _, shared = _shared(first, second, ())
    (one, prompts), (two, others) = (row.metric(metric, shared) for row in (first, second))
    return _compare(one, two, first, second)[0] if prompts == others else None


def _shared(
    first: RowScores, second: RowScores, rewards: Sequence[str]
) -> tuple[list[str], list[int] | None]:
    """The rewards that both rows have, and the seeds; None where they share no seed."""
    known = [name for name in rewards if name in first.rewards and name in second.rewards]
    return known, sorted(set(first.seeds) & set(second.seeds)) or None


def _compare(
    one: npt.NDArray[np.float64],
    two: npt.NDArray[np.float64],
    first: RowScores,
    second: RowScores,
) -> list[Comparison]:
    """Comparisons of [quantities, cells, prompts] with another such array."""
    if strongest_label(first, second) == "checkpoint":
        return checkpoint_comparisons(one.mean(axis=1), two.mean(axis=1))
    return method_comparisons(*np.broadcast_arrays(one.mean(axis=2), two.mean(axis=2)))


class ComparedRows:
    """The comparisons of a table's rows in its rewards, each made once.

    Attributes:
        results: the rows by key.
        rewards: the score columns.
    """

    def __init__(self, results: Mapping[str, RowScores], rewards: Sequence[str]) -> None:
        self.results, self.rewards = results, rewards
        self._known: dict[tuple[str, str], dict[str, Comparison]] = {}

    def __call__(self, first: str, second: str) -> dict[str, Comparison]:
        """First minus second, by reward."""
        if (second, first) in self._known:
            found = self._known[second, first]
            return {reward: _reversed(one) for reward, one in found.items()}
        if (first, second) not in self._known:
            rows = self.results[first], self.results[second]
            self._known[first, second] = compare_rows(*rows, self.rewards)
        return self._known[first, second]

    def hacking(self, key: str, baseline: str | None, about: Label | None) -> RewardHacking | None:
        """Compares a trained row with the baseline in the table's rewards and in diversity.

        The p-values of one row are corrected together by Holm's procedure.

        Args:
            key: the trained row.
            baseline: the untrained model; None where the table has none.
            about: what the table's intervals of the row are about.

        Returns:
            None where it cannot be told: no baseline, one under another protocol, too few shared
            seeds for the label, or no training reward among the columns.
        """
        if baseline is None or key == baseline or not {key, baseline} <= self.results.keys():
            return None
        row, base = self.results[key], self.results[baseline]
        trained = row.cells[0].info.train_rewards
        if not alike(row, base) or strongest_label(row, base) != about:
            return None
        compared = dict(self(key, baseline))
        if not set(trained) & set(compared):
            return None
        for metric in DIVERSITY:
            found = compare_metric(row, base, metric)
            if found is not None:
                compared[metric] = found
        adjusted = corrected(compared)
        settled = [name for name in compared if adjusted[name] < ALPHA]
        rose = [n for n in settled if compared[n].difference > 0 and n in trained]
        fell = [n for n in settled if compared[n].difference < 0 and n not in trained]
        return RewardHacking(flagged=bool(rose and fell), rose=tuple(rose), fell=tuple(fell))


def _reversed(found: Comparison) -> Comparison:
    return replace(found, difference=-found.difference, low=-found.high, high=-found.low)
