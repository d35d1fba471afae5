"""Raters' answers, and what they say: how often the first model's picture was preferred."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import scipy.stats

from benchmarks.evaluation.statistics import (
    LEVEL,
    MIN_SEEDS,
    Interval,
    method_intervals,
    sign_flip_p_values,
)
from benchmarks.evaluation.statistics.improvement import share_intervals
from g2rpo.config import nearest
from g2rpo.data.tables import SUFFIXES, Row, read_table
from g2rpo.errors import UserError
from reproduce.raters.key import COLUMNS, Choice, SheetKey

Answers = dict[str, Choice]
"""One rater's answers by pair; pairs without an answer are left out."""

OUTCOMES = {"first": 1.0, "tie": 0.5, "second": 0.0}


def read_answers(paths: Iterable[Path], key: SheetKey) -> dict[str, Answers]:
    """All answers by rater.

    Args:
        paths: files with the columns ``sheet, rater, pair, answer``, separated by a comma,
            semicolon or tab; several raters may share one, and the file's name stands for a rater
            that is left empty. Names that differ only in case or spaces are of one rater, called
            as it is spelt first.
        key: the key of the sheet.

    Raises:
        UserError: a file is none, is of another sheet, names an unknown pair or answer or one pair
            twice, or a rater answered nothing; one line with the file and line.
    """
    found: dict[str, Answers] = {}
    where: dict[tuple[str, str], str] = {}
    spelt: dict[str, str] = {}
    for path in paths:
        for row in _rows(path):
            place = f"{path}, {row.place}"
            given, pair, answer = _checked(row.values, key, place, path.stem)
            rater = spelt.setdefault(" ".join(given.casefold().split()), given)
            if (rater, pair) in where:
                first = where[rater, pair]
                raise UserError(f"{place}: {rater} answers pair {pair} again, first in {first}")
            where[rater, pair] = place
            answers = found.setdefault(rater, {})
            if answer is not None:
                answers[pair] = answer
    for rater, answers in found.items():
        if not answers:
            raise UserError(f"{rater} has answered nothing")
    if not found:
        raise UserError("there is not one answer")
    return found


def _rows(path: Path) -> list[Row]:
    if path.suffix.lower() in SUFFIXES[2:]:
        raise UserError(f"{path}: raters' answers are a .csv or .tsv file")
    table = read_table(path, COLUMNS)
    for name in COLUMNS:
        table.column([name])
    return [row for row in table.rows if not row.is_blank]


def _checked(
    row: Mapping[str, str], key: SheetKey, place: str, file: str
) -> tuple[str, str, Choice | None]:
    sheet, rater, pair, answer = (row[name].strip() for name in COLUMNS)
    if sheet != key.sheet:
        raise UserError(f"{place}: an answer to the sheet {sheet!r}, the key is of {key.sheet!r}")
    known = [one.pair for one in key.pairs]
    # A spreadsheet takes the zeros away.
    pair = pair.zfill(len(known[0])) if pair.isdigit() else pair
    if pair not in known:
        raise UserError(f"{place}: no pair {pair!r} in this sheet ({known[0]} to {known[-1]})")
    choices: tuple[Choice, ...] = get_args(Choice)
    chosen = next((choice for choice in choices if choice == answer.lower()), None)
    if answer and chosen is None:
        raise UserError(f"{place}: no answer {answer!r}; {nearest(answer.lower(), choices)}")
    return rater or file, pair, chosen


@dataclass(frozen=True)
class Rate:
    """How often something happened: ``share`` with its interval, of ``count``."""

    share: float
    low: float
    high: float
    count: int


def wilson(successes: int, count: int) -> Rate:
    """A share of independent yes or no answers with Wilson's interval; all of 0..1 without any."""
    if not count:
        return Rate(0.5, 0.0, 1.0, 0)
    found = scipy.stats.binomtest(successes, count)
    interval = found.proportion_ci(LEVEL, method="wilson")
    return Rate(successes / count, float(interval.low), float(interval.high), count)


@dataclass(frozen=True)
class Verdict:
    """What raters said.

    Attributes:
        first: the first side's label.
        second: the second side's.
        outcomes: answers for ``first``, ``tie`` and ``second``.
        win_rate: how often the first is preferred on a pair like these, ties counting half:
            bootstrap over the pairs, each the mean over its raters.
        p_value: of the hypothesis that neither is preferred: sign-flip test over the pairs.
        over_raters: the same rate with the raters as the sample, where there are three.
        raters: each rater's win rate, with Wilson's interval over the answers that are no tie.
        decided: the first's share of all answers that are no tie, with Wilson's interval, for
            which every answer counts as independent.
        left: the share of answers for the left picture among those that are no tie.
        agreement: how often two raters gave a pair the same answer; None with one rater.
        missing: answers that were not given.
    """

    first: str
    second: str
    outcomes: Mapping[str, int]
    win_rate: Interval
    p_value: float
    over_raters: Interval | None
    raters: Mapping[str, Rate]
    decided: Rate
    left: Rate
    agreement: float | None
    missing: int


def judge(key: SheetKey, answers: Mapping[str, Answers]) -> Verdict:
    """Undoes the blinding and counts.

    Raises:
        UserError: fewer than two pairs were answered.
    """
    left = {pair.pair: pair.left for pair in key.pairs}
    won = {
        rater: {pair: _winner(choice, left[pair]) for pair, choice in given.items()}
        for rater, given in answers.items()
    }
    shares = _shares(won.values())
    if len(shares) < 2:
        raise UserError("an interval needs answers to two pairs at least")
    (win_rate,) = share_intervals(shares[None])
    (p_value,) = sign_flip_p_values(shares[None] - 0.5, tolerance=1e-12)
    counts = Counter(winner for given in won.values() for winner in given.values())
    sides = Counter(choice for given in answers.values() for choice in given.values())
    asked = len(answers) * len(key.pairs)
    return Verdict(
        first=key.first,
        second=key.second,
        outcomes={name: counts[name] for name in OUTCOMES},
        win_rate=win_rate,
        p_value=float(p_value),
        over_raters=_over_raters(list(won.values())),
        raters={rater: _decided(given.values()) for rater, given in won.items()},
        decided=wilson(counts["first"], counts["first"] + counts["second"]),
        left=wilson(sides["left"], sides["left"] + sides["right"]),
        agreement=_agreement(list(won.values())),
        missing=asked - sum(len(given) for given in answers.values()),
    )


def _winner(choice: Choice, left: str) -> str:
    if choice == "tie":
        return "tie"
    return left if choice == "left" else ("second" if left == "first" else "first")


def _shares(won: Iterable[Mapping[str, str]]) -> np.ndarray:
    """The first's mean outcome of every pair that was answered: [pairs], float64."""
    by_pair: dict[str, list[float]] = {}
    for given in won:
        for pair, winner in given.items():
            by_pair.setdefault(pair, []).append(OUTCOMES[winner])
    return np.array([np.mean(by_pair[pair]) for pair in sorted(by_pair)])


def _decided(winners: Iterable[str]) -> Rate:
    counts = Counter(winners)
    return wilson(counts["first"], counts["first"] + counts["second"])


def _over_raters(won: Sequence[Mapping[str, str]]) -> Interval | None:
    if len(won) < MIN_SEEDS:
        return None
    rates = [np.mean([OUTCOMES[winner] for winner in given.values()]) for given in won]
    (found,) = method_intervals([rates])
    return Interval(found.mean, max(0.0, found.low), min(1.0, found.high), "method", found.count)


def _agreement(won: Sequence[Mapping[str, str]]) -> float | None:
    same = [
        one[pair] == two[pair]
        for one, two in combinations(won, 2)
        for pair in one.keys() & two.keys()
    ]
    return float(np.mean(same)) if same else None
