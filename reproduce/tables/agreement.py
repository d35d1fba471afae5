"""Whether the methods of an experiment have the same order under two profiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

import numpy as np
import numpy.typing as npt

from benchmarks.evaluation.results import Cell
from benchmarks.evaluation.statistics import (
    ALPHA,
    MIN_SEEDS,
    RESAMPLES,
    corrected,
    method_comparisons,
)
from g2rpo.errors import UserError
from reproduce.experiment import Experiment, Profile
from reproduce.experiment.table import RowSpec
from reproduce.tables.headroom import MEASURES, common_scale
from reproduce.tables.rows import select_rows

FloatArray = npt.NDArray[np.float64]
SeedMeans = Mapping[int, float]
"""Means over the prompts by training seed."""


@dataclass(frozen=True)
class Agreement:
    """How similarly two profiles rank the rows of a group.

    Attributes:
        group: the group's heading.
        measure: ``in_domain`` or ``out_of_domain``.
        labels: the rows' labels.
        means: by profile, one for each row.
        tau: Kendall's rank correlation of the means: the share of pairs in the same order less
            that of pairs in the opposite order.
        low: lower end of its 95 % interval, from resampling the seeds of both profiles.
        high: upper end.
        same: pairs of rows in the same order.
        pairs: all pairs of rows.
        significant: pairs whose order is significant under both profiles, by paired t-tests with
            Holm's correction over the pairs of a profile.
        contradicted: those of them that have opposite orders.
        repeated: the mean tau between two disjoint sets of this many seeds of the first profile, an
            approximate upper bound of ``tau``; None if it has too few seeds.
    """

    group: str
    measure: str
    labels: tuple[str, ...]
    means: dict[str, tuple[float, ...]]
    tau: float
    low: float
    high: float
    same: int
    pairs: int
    significant: int
    contradicted: int
    repeated: float | None


def seed_means(
    experiment: Experiment, profile: Profile, cells: Sequence[Cell]
) -> tuple[tuple[RowSpec, ...], dict[str, dict[str, SeedMeans]]]:
    """The experiment's rows, and the means over the prompts by measure, row and seed.

    Raises:
        UserError: the cells do not fit the experiment, or have no common scale.
    """
    spec = experiment.table_spec(profile)
    results = select_rows(spec, cells)
    scale, notes = common_scale(spec, results)
    if scale is None:
        why = " ".join(notes) or "its table has neither headroom nor primary comparisons"
        raise UserError(f"{experiment.name}, profile {profile.name}: {why}")
    found: dict[str, dict[str, SeedMeans]] = {}
    for key, row in scale.measured_rows(spec, results).items():
        for measure in (name for name in MEASURES if name in row.rewards):
            (means,) = row.scores([measure]).mean(axis=2)
            by_seed = dict(zip(row.seeds, map(float, means), strict=True))
            found.setdefault(measure, {})[key] = by_seed
    return spec.rows, found


def agreements(
    experiment: Experiment,
    first: tuple[Profile, Sequence[Cell]],
    second: tuple[Profile, Sequence[Cell]],
    seeds: Sequence[int] | None = None,
) -> list[Agreement]:
    """Compares the order of the rows under two profiles, by measure and group.

    Args:
        experiment: the experiment that both profiles ran.
        first: a profile and its finished cells.
        second: another.
        seeds: the training seeds to compare; None for all that every row of a profile has.

    Raises:
        UserError: no two rows of a group have results under both profiles, or the rows of a group
            share fewer than three seeds under one.
    """
    rows, ours = seed_means(experiment, *first)
    _, theirs = seed_means(experiment, *second)
    found = []
    for measure in (name for name in MEASURES if name in ours and name in theirs):
        shared = [row for row in rows if row.key in ours[measure] and row.key in theirs[measure]]
        for _, members in groupby(shared, lambda row: row.group):
            group = list(members)
            if len(group) > 1:
                by_profile = {first[0].name: ours[measure], second[0].name: theirs[measure]}
                found.append(_agreement(measure, group, by_profile, seeds))
    if not found:
        raise UserError(
            f"{experiment.name}: no two methods have results under both {first[0].name} and "
            f"{second[0].name}"
        )
    return found


def _agreement(
    measure: str,
    rows: Sequence[RowSpec],
    by_profile: Mapping[str, Mapping[str, SeedMeans]],
    seeds: Sequence[int] | None,
) -> Agreement:
    group = rows[0].group
    chosen = {name: _matrix(rows, values, seeds) for name, values in by_profile.items()}
    for name, matrix in chosen.items():
        if matrix.shape[1] < MIN_SEEDS:
            raise UserError(
                f"profile {name}: the methods of the group {group!r} share {matrix.shape[1]} of "
                f"the seeds; at least {MIN_SEEDS} are needed"
            )
    first, (_, other) = next(iter(by_profile.values())), chosen.values()
    means = [matrix.mean(axis=1) for matrix in chosen.values()]
    orders = [np.sign(pair_differences(one)) for one in means]
    resampled = [_resampled(one, seed) for seed, one in enumerate(chosen.values())]
    low, high = np.quantile(rank_correlation(*resampled), [0.025, 0.975])
    significant = np.logical_and(*map(_significant, chosen.values()))
    return Agreement(
        group=group,
        measure=measure,
        labels=tuple(row.label for row in rows),
        means=dict(zip(chosen, (tuple(one.tolist()) for one in means), strict=True)),
        tau=float(rank_correlation(*means)),
        low=float(low),
        high=float(high),
        same=int((orders[0] == orders[1]).sum()),
        pairs=len(orders[0]),
        significant=int(significant.sum()),
        contradicted=int((significant & (orders[0] != orders[1])).sum()),
        repeated=repeated_correlation(_matrix(rows, first, None), other.shape[1]),
    )


def _matrix(
    rows: Sequence[RowSpec], values: Mapping[str, SeedMeans], seeds: Sequence[int] | None
) -> FloatArray:
    """The values as [rows, seeds], of the seeds that every row has."""
    shared = set.intersection(*(set(values[row.key]) for row in rows))
    chosen = sorted(shared if seeds is None else shared & set(seeds))
    return np.array([[values[row.key][seed] for seed in chosen] for row in rows])


def pair_differences(values: FloatArray) -> FloatArray:
    """[..., rows] to the differences of each pair of rows, [..., pairs]."""
    one, other = np.triu_indices(values.shape[-1], 1)
    differences: FloatArray = values[..., one] - values[..., other]
    return differences


def rank_correlation(first: FloatArray, second: FloatArray) -> FloatArray:
    """Kendall's tau-a of [..., rows] and [..., rows], as [...]."""
    found: FloatArray = (np.sign(pair_differences(first)) * np.sign(pair_differences(second))).mean(
        axis=-1
    )
    return found


def _resampled(values: FloatArray, seed: int) -> FloatArray:
    """The means of resampled seeds, [resamples, rows]; all rows are resampled alike."""
    count = values.shape[1]
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    means: FloatArray = values[:, drawn].mean(axis=2).T
    return means


def _significant(values: FloatArray) -> npt.NDArray[np.bool_]:
    """Whether each pair of rows of [rows, seeds] differs significantly, as [pairs]."""
    one, other = np.triu_indices(len(values), 1)
    found = dict(enumerate(method_comparisons(values[one], values[other])))
    return np.array(list(corrected(found).values())) < ALPHA


def repeated_correlation(values: FloatArray, count: int) -> float | None:
    """The mean tau of each pair of disjoint sets of ``count`` seeds of [rows, seeds]."""
    seeds = range(values.shape[1])
    found = [
        rank_correlation(values[:, one].mean(axis=1), values[:, other].mean(axis=1))
        for one in combinations(seeds, count)
        for other in combinations(sorted(set(seeds) - set(one)), count)
        if one < other
    ]
    return float(np.mean(found)) if found else None
