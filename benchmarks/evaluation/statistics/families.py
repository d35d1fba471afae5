"""All methods and rewards at once: comparisons whose p-values are corrected as one family."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from benchmarks.evaluation.statistics.comparisons import (
    checkpoint_comparisons,
    holm,
    method_comparisons,
)
from benchmarks.evaluation.statistics.improvement import (
    checkpoint_improvements,
    method_improvements,
)
from benchmarks.evaluation.statistics.inputs import FloatArray, as_cube, paired_cubes
from benchmarks.evaluation.statistics.records import (
    DEFAULT_RESAMPLING,
    Comparison,
    CorrectedComparison,
    Interval,
    Label,
    Resampling,
)

_Stacked = tuple[FloatArray, FloatArray]


def compare_with_baseline(
    scores: Mapping[str, npt.ArrayLike],
    baseline: str,
    rewards: Sequence[str],
    *,
    label: Label,
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> list[CorrectedComparison]:
    """Compares every method with one baseline under every reward, as one family.

    Args:
        scores: method to [rewards, seeds, prompts], all on the same prompts and shared seeds; one
            "seed" stands for a model without, such as the untrained base.
        baseline: the method that the others are compared with.
        rewards: the names along the first axis.
        label: ``checkpoint`` averages each prompt's score over the seeds and pairs the prompts;
            ``method`` averages over the prompts and pairs the seeds.
        resampling: level, resamples, draws and kind of interval; of it ``method`` uses the level.

    Returns:
        Method minus baseline, method by method in the order of ``scores``, then by reward.

    Raises:
        ValueError: see :func:`compare_pairs`.
    """
    pairs = [(name, baseline) for name in scores if name != baseline]
    if baseline not in scores:
        raise ValueError(f"no scores of the baseline {baseline!r}")
    return compare_pairs(scores, pairs, rewards, label=label, resampling=resampling)


def compare_pairs(
    scores: Mapping[str, npt.ArrayLike],
    pairs: Sequence[tuple[str, str]],
    rewards: Sequence[str],
    *,
    label: Label,
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> list[CorrectedComparison]:
    """Compares given pairs of methods under every reward, as one family.

    Raw p-values are the sign-flip test's (checkpoint) or the paired t-test's (method); Holm's
    correction runs over all pairs and rewards.

    Args:
        scores: method to [rewards, seeds, prompts], as in :func:`compare_with_baseline`.
        pairs: names of methods; the second is subtracted from the first.
        rewards: the names along the first axis.
        label: ``checkpoint`` or ``method``.
        resampling: level, resamples, draws and kind of interval; of it ``method`` uses the level.

    Returns:
        Pair by pair in the order given, then by reward.

    Raises:
        ValueError: a method is unknown, a pair is given twice or is no pair, the shapes do not fit
            each other or the rewards, there are too few prompts (two) or seeds (three) for the
            label, or a score is not finite.
    """
    _check_pairs(scores, pairs)
    if not pairs or not rewards:
        return []
    cubes = {name: as_cube(scores[name]) for name in dict.fromkeys(chain(*pairs))}
    for name, cube in cubes.items():
        if cube.shape[0] != len(rewards):
            raise ValueError(f"{name!r} has shape {cube.shape} for {len(rewards)} rewards")
    paired = [paired_cubes(cubes[first], cubes[second]) for first, second in pairs]
    if len({one.shape for one, _ in paired}) > 1:
        raise ValueError("not paired: the pairs differ in their seeds or prompts")
    first, second = (np.concatenate(side) for side in zip(*paired, strict=True))
    compared, improved = _compare((first, second), label, resampling)
    adjusted = holm([c.p_value for c in compared])
    names = [(one, two, reward) for one, two in pairs for reward in rewards]
    return [
        CorrectedComparison(*name, comparison, float(p), len(names), improvement)
        for name, comparison, p, improvement in zip(
            names, compared, adjusted, improved, strict=True
        )
    ]


def _check_pairs(scores: Mapping[str, npt.ArrayLike], pairs: Sequence[tuple[str, str]]) -> None:
    for (first, second), times in Counter(pairs).items():
        for name in (first, second):
            if name not in scores:
                raise ValueError(f"no scores of {name!r}")
        # Either would count one question twice in the correction.
        if first == second or times > 1 or (second, first) in pairs:
            raise ValueError(f"{first!r} and {second!r} are no pair, or are compared twice")


def _compare(
    stacked: _Stacked, label: Label, resampling: Resampling
) -> tuple[list[Comparison], list[Interval]]:
    first, second = stacked
    level = resampling.level
    if label == "method":
        means = (first.mean(axis=2), second.mean(axis=2))
        return method_comparisons(*means, level=level), method_improvements(*stacked, level=level)
    if label != "checkpoint":
        raise ValueError(f"label is checkpoint or method, not {label!r}")
    resamples, seed, kind = resampling.resamples, resampling.seed, resampling.kind
    # The draws are named by the seed and the numbers of prompts and resamples: the same in both.
    compared = checkpoint_comparisons(
        first.mean(axis=1),
        second.mean(axis=1),
        level=level,
        resamples=resamples,
        seed=seed,
        kind=kind,
    )
    improved = checkpoint_improvements(
        first, second, level=level, resamples=resamples, seed=seed, kind=kind
    )
    return compared, improved
