"""Runs compared with a reference run: scores, learning curves, settings and provenance.

Runs that differ only in their seed are grouped, so that comparisons are seed-level with three
shared seeds and prompt-level otherwise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase

import numpy as np

from benchmarks.evaluation.results import Cell, Protocol, RowScores, gather_rows
from benchmarks.evaluation.statistics import (
    MIN_SEEDS,
    NOTHING,
    Comparison,
    corrected,
    method_comparisons,
)
from g2rpo.errors import UserError
from reproduce.runs.finished import Run
from reproduce.settings import NOT_DETERMINING, flat
from reproduce.tables.comparisons import compare_metric, compare_rows, shared_seeds


@dataclass(frozen=True, eq=False)
class Member:
    """Runs that differ only in their seed, and the letter that stands for them."""

    letter: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The training seeds."""
        return tuple(run.seed for run in self.runs if run.seed is not None)


def members(runs: Sequence[Run]) -> list[Member]:
    """Groups runs by everything but their seed, in the order given.

    Raises:
        UserError: two runs have the same settings and seed, or there is nothing to compare.
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.without_seed, []).append(run)
    if len(runs) < 2:
        raise UserError("only one run is named; name another to compare with it")
    if len(grouped) < 2:
        raise UserError(
            "the runs differ only in their seed; name one with other settings to compare"
        )
    if len(grouped) > len(ascii_uppercase):
        raise UserError(f"too many methods to compare; name at most {len(ascii_uppercase)}")
    found = []
    for letter, alike in zip(ascii_uppercase, grouped.values(), strict=False):
        ordered = sorted(alike, key=lambda run: run.seed or 0)
        if len({run.seed for run in ordered}) < len(ordered):
            names = ", ".join(run.name for run in ordered)
            raise UserError(f"runs with the same settings and seed: {names}; name only one")
        found.append(Member(letter, tuple(ordered)))
    return found


@dataclass(frozen=True)
class Delta:
    """One quantity of one member, and its difference from the reference.

    Attributes:
        member: the member's letter.
        quantity: the reward or metric.
        value: the member's mean.
        difference: member minus reference; None for the reference itself.
        comparison: the difference with its interval, if there are enough seeds or prompts.
        adjusted: the p-value after Holm's correction over the table's comparisons.
        seeds: the shared seeds; without any, each member is averaged over its own.
        iteration: the iteration of a learning curve; None for held-out scores.
    """

    member: str
    quantity: str
    value: float
    difference: float | None = None
    comparison: Comparison | None = None
    adjusted: float | None = None
    seeds: tuple[int, ...] = ()
    iteration: int | None = None


# Scores


@dataclass(frozen=True)
class Section:
    """The members evaluated under one protocol; ``missing`` are the letters of the others."""

    protocol: str
    prompts: int
    deltas: tuple[Delta, ...]
    missing: tuple[str, ...]


def score_sections(compared: Sequence[Member]) -> list[Section]:
    """One section per protocol under which the reference, the first, and another were evaluated.

    Raises:
        UserError: scores under one protocol are for different prompts.
    """
    cells = [(one.letter, cell) for one in compared for run in one.runs for cell in run.cells]
    protocols: dict[str, str] = {}
    for _, cell in cells:
        protocols.setdefault(cell.info.protocol.hash, cell.info.protocol.title)
    sections = []
    for digest, name in protocols.items():
        rows = _rows(cells, digest)
        base = rows.get(compared[0].letter)
        if base is not None and len(rows) > 1:
            missing = tuple(one.letter for one in compared if one.letter not in rows)
            count, deltas = len(base.prompt_ids), _deltas(rows, base)
            sections.append(Section(f"{name} ({digest})", count, deltas, missing))
    return sections


def _rows(cells: Sequence[tuple[str, Cell]], digest: str) -> dict[str, RowScores]:
    """Each member's scores under one protocol, by letter."""
    # A run folder has no names from tables.
    same = {"protocol": Protocol(name="", hash=digest), "train_rewards": (), "preset": None}
    found = gather_rows(
        replace(cell, info=cell.info.model_copy(update={"row": letter, **same}))
        for letter, cell in cells
        if cell.info.protocol.hash == digest
    )
    if len({row.prompt_ids for row in found.values()}) > 1:
        raise UserError(f"protocol {digest}: the runs were scored on different prompts")
    return found


def _deltas(rows: Mapping[str, RowScores], base: RowScores) -> tuple[Delta, ...]:
    compared = {
        (letter, name): one
        for letter, row in rows.items()
        if row is not base
        for name, one in _compared(row, base).items()
    }
    adjusted = corrected(compared)
    quantities = {letter: (*row.rewards, *row.metrics) for letter, row in rows.items()}
    found = []
    for name in dict.fromkeys(name for names in quantities.values() for name in names):
        for letter in sorted(letter for letter, names in quantities.items() if name in names):
            row, one = rows[letter], compared.get((letter, name))
            values = row.scores([name]) if name in row.rewards else row.metric(name)[0]
            found.append(
                Delta(
                    letter,
                    name,
                    float(values.mean()),
                    difference=None if one is None else one.difference,
                    comparison=one,
                    adjusted=adjusted.get((letter, name)),
                    seeds=() if one is None else shared_seeds(row, base),
                )
            )
    return tuple(found)


def _compared(row: RowScores, base: RowScores) -> dict[str, Comparison]:
    found = compare_rows(row, base, row.rewards)
    metrics = {name: compare_metric(row, base, name) for name in row.metrics}
    return found | {name: one for name, one in metrics.items() if one is not None}


# Learning curves


def curve_deltas(compared: Sequence[Member]) -> list[Delta]:
    """Validation rewards at the last iteration that each member shares with the reference.

    Includes unfinished runs; members that share no iteration are skipped.
    """
    reference = compared[0]
    found = [delta for member in compared[1:] for delta in _curve_deltas(member, reference)]
    known = {(one.member, one.quantity): one.comparison for one in found if one.comparison}
    adjusted = corrected(known)
    return [replace(one, adjusted=adjusted.get((one.member, one.quantity))) for one in found]


def _curve_deltas(member: Member, reference: Member) -> Iterator[Delta]:
    ours, theirs = _validations(member), _validations(reference)
    for reward in [name for name in ours if name in theirs]:
        curves = (*ours[reward].values(), *theirs[reward].values())
        shared = set.intersection(*(set(curve) for curve in curves))
        if not shared:
            continue
        last = max(shared)
        one, two = (
            {name: curve[last] for name, curve in runs[reward].items()} for runs in (ours, theirs)
        )
        seeds = tuple(sorted(set(member.seeds) & set(reference.seeds)))
        ends = [[side[seed] for seed in seeds or side] for side in (one, two)]
        comparison = None
        if len(seeds) >= MIN_SEEDS:
            comparison = method_comparisons([ends[0]], [ends[1]])[0]
        yield Delta(
            member=member.letter,
            quantity=reward,
            value=float(np.mean(list(one.values()))),
            difference=float(np.mean(ends[0]) - np.mean(ends[1])),
            comparison=comparison,
            seeds=seeds,
            iteration=last,
        )


def _validations(member: Member) -> dict[str, dict[int | None, dict[int, float]]]:
    """The curve of each seed, by reward that all runs were validated on."""
    curves: dict[str, dict[int | None, dict[int, float]]] = {}
    for run in member.runs:
        for row in run.rows:
            for key in (key for key in row if key.startswith("validation/")):
                seeds = curves.setdefault(key.removeprefix("validation/"), {})
                seeds.setdefault(run.seed, {})[int(row["iteration"])] = float(row[key])
    return {name: seeds for name, seeds in curves.items() if len(seeds) == len(member.runs)}


# Settings and provenance


@dataclass(frozen=True)
class Difference:
    """A dotted key with each member's value; ``determining`` if it changes the trained weights."""

    key: str
    values: tuple[str, ...]
    determining: bool = True


def setting_differences(compared: Sequence[Member]) -> list[Difference]:
    """The settings in which members differ, those that do not change the weights last.

    Members without known settings show a dash and are not compared.
    """
    settings = [[flat(run.settings or {}) for run in one.runs] for one in compared]
    return sorted(_differences(settings), key=lambda one: (not one.determining, one.key))


def provenance_differences(compared: Sequence[Member]) -> list[Difference]:
    """The code, packages, weights and hardware in which members differ."""
    made = [[run.provenance for run in member.runs] for member in compared]
    dumped = [[flat(one.model_dump(mode="json") if one else {}) for one in runs] for runs in made]
    return _differences(dumped)


def _differences(compared: Sequence[Sequence[Mapping[str, str]]]) -> list[Difference]:
    keys = dict.fromkeys(key for member in compared for run in member for key in run)
    found = []
    for key in keys:
        values = tuple(
            ", ".join(dict.fromkeys(run.get(key, NOTHING) for run in member)) for member in compared
        )
        known = {value for value, member in zip(values, compared, strict=True) if any(member)}
        if len(known) > 1:
            determining = key.split(".")[0] not in NOT_DETERMINING
            found.append(Difference(key, values, determining))
    return found
