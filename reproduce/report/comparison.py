"""Runs against a reference run: differences of scores, of settings, and of cost.

Runs that differ in nothing but their seed are taken together, so that a comparison is about the
methods where three seeds are shared, and about the trained weights at hand elsewhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase

import numpy as np

from benchmarks.evaluation.results import Cell, Protocol, RowScores, gather_rows
from benchmarks.evaluation.statistics import (
    MIN_SEEDS,
    Comparison,
    Interval,
    holm,
    method_comparisons,
    row_intervals,
)
from g2rpo.errors import UserError
from reproduce.experiment.settings import NOT_DETERMINING, flat
from reproduce.runs.finished import Run
from reproduce.tables.comparisons import compare_metric, compare_rows, strongest_label

ABSENT = "–"


@dataclass(frozen=True, eq=False)
class Member:
    """Runs that are one method at one or several seeds.

    Attributes:
        letter: what tables call it.
        runs: by seed.
    """

    letter: str
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        """The names of its runs."""
        return ", ".join(run.name for run in self.runs)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Its training seeds."""
        return tuple(run.seed for run in self.runs if run.seed is not None)


def members(records: Sequence[Run]) -> list[Member]:
    """The runs put together by all but their seed, in the order in which they were named.

    Raises:
        UserError: two runs have the same settings and seed, or there is nothing to compare.
    """
    grouped: dict[str, list[Run]] = {}
    for record in records:
        grouped.setdefault(record.without_seed, []).append(record)
    if len(grouped) < 2:
        raise UserError("compare takes runs that differ in more than their seed; name another one")
    if len(grouped) > len(ascii_uppercase):
        raise UserError(f"compare takes {len(ascii_uppercase)} methods at most")
    found = []
    for letter, runs in zip(ascii_uppercase, grouped.values(), strict=False):
        ordered = sorted(runs, key=lambda run: run.seed or 0)
        seeds = [run.seed for run in ordered]
        if len(set(seeds)) < len(seeds):
            names = ", ".join(run.name for run in ordered)
            raise UserError(f"two runs have the same settings and seed: {names}; name one of them")
        found.append(Member(letter, tuple(ordered)))
    return found


# Scores


@dataclass(frozen=True)
class Delta:
    """One quantity of one member, and how it differs from the reference.

    Attributes:
        member: the member's letter.
        quantity: the reward or metric.
        value: mean and interval of the member itself.
        comparison: member minus reference; None for the reference and where it cannot be had.
        adjusted: the p-value after Holm's correction over the section's comparisons.
        seeds: over which the two were compared; empty where they share none, and each is then
            taken over its own.
    """

    member: str
    quantity: str
    value: Interval
    comparison: Comparison | None = None
    adjusted: float | None = None
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Section:
    """The members that were evaluated under one protocol.

    Attributes:
        protocol: what it is called.
        prompts: how many prompts were scored.
        deltas: quantity by quantity, the reference first.
        missing: letters of members without this evaluation.
    """

    protocol: str
    prompts: int
    deltas: tuple[Delta, ...]
    missing: tuple[str, ...]


def score_sections(compared: Sequence[Member]) -> list[Section]:
    """One section for each protocol under which the reference and another were evaluated.

    Args:
        compared: the members; the first is the reference.

    Raises:
        UserError: scores under one protocol are of different prompts.
    """
    sections = []
    for digest, name in _protocols(compared).items():
        rows = _rows(compared, digest)
        reference = compared[0].letter
        if reference in rows and len(rows) > 1:
            missing = tuple(one.letter for one in compared if one.letter not in rows)
            deltas = _deltas(rows, reference)
            sections.append(Section(name, len(rows[reference].prompt_ids), deltas, missing))
    return sections


def _protocols(compared: Sequence[Member]) -> dict[str, str]:
    """Hash to name of all protocols, in the order in which they are met."""
    cells = [cell for member in compared for run in member.runs for cell in run.cells]
    found: dict[str, str] = {}
    for protocol in (cell.info.protocol for cell in cells):
        found.setdefault(protocol.hash, f"{protocol.name} ({protocol.hash})")
    return found


def _rows(compared: Sequence[Member], digest: str) -> dict[str, RowScores]:
    """The scores of each member under one protocol, by letter."""
    cells = [
        _named(cell, member.letter.lower())
        for member in compared
        for run in member.runs
        for cell in run.cells
        if cell.info.protocol.hash == digest
    ]
    rows = {row.upper(): found for row, found in gather_rows(cells).items()}
    prompts = {found.prompt_ids for found in rows.values()}
    if len(prompts) > 1:
        raise UserError(f"protocol {digest}: the runs were scored on different prompts")
    return rows


def _named(cell: Cell, row: str) -> Cell:
    """The cell as one of ``row``; a run folder does not know the names that tables give."""
    protocol = Protocol(name="", hash=cell.info.protocol.hash)
    changes = {"row": row, "protocol": protocol, "train_rewards": (), "preset": None}
    return replace(cell, info=cell.info.model_copy(update=changes))


def _deltas(rows: Mapping[str, RowScores], reference: str) -> tuple[Delta, ...]:
    base = rows[reference]
    found: dict[tuple[str, str], Delta] = {}
    for letter, row in rows.items():
        for name in (*row.rewards, *row.metrics):
            scores = row.scores([name]) if name in row.rewards else row.metric(name)[0]
            found[name, letter] = Delta(letter, name, row_intervals(scores)[0])
        if letter == reference:
            continue
        seeds = _compared_seeds(row, base)
        for name, comparison in _compared(row, base).items():
            delta = replace(found[name, letter], comparison=comparison, seeds=seeds)
            found[name, letter] = delta
    tested = {key: one.comparison for key, one in found.items() if one.comparison is not None}
    adjusted = holm([comparison.p_value for comparison in tested.values()])
    for key, p_value in zip(tested, adjusted, strict=True):
        found[key] = replace(found[key], adjusted=float(p_value))
    order = list(dict.fromkeys(name for name, _ in found))
    return tuple(sorted(found.values(), key=lambda one: (order.index(one.quantity), one.member)))


def _compared_seeds(row: RowScores, base: RowScores) -> tuple[int, ...]:
    """Those that both have; a model without seeds is compared with all of the other's."""
    if not row.seeds or not base.seeds:
        return (*row.seeds, *base.seeds)
    return tuple(sorted({*row.seeds} & {*base.seeds}))


def _compared(row: RowScores, base: RowScores) -> dict[str, Comparison]:
    label = strongest_label(row, base)
    shared = [name for name in row.rewards if name in base.rewards]
    found = dict(zip(shared, compare_rows(row, base, shared, label), strict=True))
    for metric in row.metrics:
        comparison = compare_metric(row, base, metric, label)
        if comparison is not None:
            found[metric] = comparison
    return found


# Learning curves


@dataclass(frozen=True)
class CurvePoint:
    """A validation reward of a member at an iteration that the reference has as well.

    Attributes:
        member: the member's letter.
        reward: the reward.
        iteration: the last one that both have.
        value: mean over the member's seeds.
        difference: of the means over the shared seeds, or over each one's own where there are none.
        comparison: over shared seeds, where there are three.
        seeds: the shared ones.
    """

    member: str
    reward: str
    iteration: int
    value: float
    difference: float
    comparison: Comparison | None
    seeds: tuple[int, ...]


def curve_points(compared: Sequence[Member]) -> list[CurvePoint]:
    """Validation rewards at the last iteration that each member shares with the reference.

    Runs that are not finished have them too. Nothing where a run shares none.
    """
    reference = compared[0]
    return [point for member in compared[1:] for point in _points(member, reference)]


def _points(member: Member, reference: Member) -> Iterator[CurvePoint]:
    ours, theirs = _validations(member), _validations(reference)
    for reward in [name for name in ours if name in theirs]:
        shared = set.intersection(*(set(c) for c in (*ours[reward], *theirs[reward])))
        if not shared:
            continue
        last = max(shared)
        one, two = ([curve[last] for curve in runs[reward]] for runs in (ours, theirs))
        value, seeds = float(np.mean(one)), sorted(set(member.seeds) & set(reference.seeds))
        if seeds:
            one, two = (
                [dict(zip(side.seeds, values, strict=True))[seed] for seed in seeds]
                for side, values in ((member, one), (reference, two))
            )
        comparison = None
        if len(seeds) >= MIN_SEEDS:
            comparison = method_comparisons([one], [two])[0]
        difference = float(np.mean(one) - np.mean(two))
        yield CurvePoint(member.letter, reward, last, value, difference, comparison, tuple(seeds))


def _validations(member: Member) -> dict[str, list[dict[int, float]]]:
    """For each reward that all runs were validated on, a curve a run: iteration to mean."""
    curves: dict[str, list[dict[int, float]]] = {}
    for run in member.runs:
        for key in dict.fromkeys(key for row in run.rows for key in row):
            if key.startswith("validation/"):
                rows = [row for row in run.rows if key in row]
                curve = {int(row["iteration"]): float(row[key]) for row in rows}
                curves.setdefault(key.removeprefix("validation/"), []).append(curve)
    return {name: found for name, found in curves.items() if len(found) == len(member.runs)}


# Settings and provenance


@dataclass(frozen=True)
class Difference:
    """One key that is not the same for all members.

    Attributes:
        key: dotted.
        values: for each member, as text.
        determining: whether it changes what is trained.
    """

    key: str
    values: tuple[str, ...]
    determining: bool = True


def setting_differences(compared: Sequence[Member]) -> list[Difference]:
    """The settings in which members differ; what determines nothing comes last.

    Members of which no settings are known show a dash and are not compared.
    """
    settings = [[flat(run.settings or {}) for run in one.runs] for one in compared]
    return sorted(_differences(settings), key=lambda one: (not one.determining, one.key))


def provenance_differences(compared: Sequence[Member]) -> list[Difference]:
    """In which code, packages, weights and hardware members were made, where these differ."""
    origins = []
    for member in compared:
        found = []
        for run in member.runs:
            fields = {} if run.provenance is None else run.provenance.model_dump(mode="json")
            found.append(flat(fields))
        origins.append(found)
    return _differences(origins)


def _differences(compared: Sequence[Sequence[Mapping[str, str]]]) -> list[Difference]:
    keys = dict.fromkeys(key for member in compared for run in member for key in run)
    found = []
    for key in keys:
        values = tuple(
            ", ".join(dict.fromkeys(run.get(key, ABSENT) for run in member)) for member in compared
        )
        known = {value for value, member in zip(values, compared, strict=True) if any(member)}
        if len(known) > 1:
            determining = key.split(".")[0] not in NOT_DETERMINING
            found.append(Difference(key, values, determining))
    return found
