"""Raters' answers: how often the first model's image was preferred."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import scipy.stats

from benchmarks.evaluation.statistics import (
    LEVEL,
    MIN_SEEDS,
    Interval,
    method_intervals,
    share_intervals,
    sign_flip_p_values,
)
from g2rpo.config import nearest
from g2rpo.data.tables import Row, read_table
from g2rpo.errors import UserError
from reproduce.raters.key import COLUMNS, Choice, SheetKey

Answers = dict[str, Choice]
"""One rater's answers by pair; unanswered pairs are absent."""
OUTCOMES = {"first": 1.0, "tie": 0.5, "second": 0.0}
_OTHER = {"first": "second", "second": "first"}


def read_answers(paths: Iterable[Path], key: SheetKey) -> dict[str, Answers]:
    """Reads all answers to the sheet of ``key``, by rater.

    The CSV files have the columns ``sheet, rater, pair, answer``. Several raters may share a file;
    the file's name replaces an empty rater.

    Raises:
        UserError: a file cannot be read or belongs to another sheet, a pair or answer is unknown,
            a pair is answered twice, or a rater answered nothing.
    """
    found: dict[str, Answers] = {}
    where: dict[tuple[str, str], str] = {}
    for path in paths:
        for row in _rows(path):
            place = f"{path}, {row.place}"
            rater, pair, answer = _checked(row.values, key, place)
            rater = rater or path.stem
            first = where.setdefault((rater, pair), place)
            if first != place:
                raise UserError(f"{place}: {rater} already answered pair {pair} in {first}")
            answers = found.setdefault(rater, {})
            if answer is not None:
                answers[pair] = answer
    for rater, answers in found.items():
        if not answers:
            raise UserError(f"{rater}: no answers")
    if not found:
        raise UserError("the files contain no answers")
    return found


def _rows(path: Path) -> list[Row]:
    if path.suffix.lower() != ".csv":
        raise UserError(f"{path}: not a .csv file")
    table = read_table(path, COLUMNS)
    for name in COLUMNS:
        table.column([name])
    return [row for row in table.rows if not row.is_blank]


def _checked(row: Mapping[str, str], key: SheetKey, place: str) -> tuple[str, str, Choice | None]:
    """The rater, pair and answer of a row."""
    sheet, rater, pair, answer = (row[name].strip() for name in COLUMNS)
    if sheet != key.sheet:
        raise UserError(f"{place}: sheet {sheet!r} does not match the key's sheet {key.sheet!r}")
    known = [one.pair for one in key.pairs]
    # Spreadsheets drop leading zeros.
    pair = pair.zfill(len(known[0])) if pair.isdigit() else pair
    if pair not in known:
        raise UserError(f"{place}: unknown pair {pair!r}; pairs are {known[0]} to {known[-1]}")
    choices: tuple[Choice, ...] = get_args(Choice)
    chosen = next((choice for choice in choices if choice == answer.lower()), None)
    if answer and chosen is None:
        raise UserError(f"{place}: unknown answer {answer!r}; {nearest(answer.lower(), choices)}")
    return rater, pair, chosen


@dataclass(frozen=True)
class Rate:
    """A share of ``count`` answers, with its interval."""

    share: float
    low: float
    high: float
    count: int


def wilson(successes: int, count: int) -> Rate:
    """A share of independent answers with Wilson's interval; 0 to 1 without answers."""
    if not count:
        return Rate(0.5, 0.0, 1.0, 0)
    found = scipy.stats.binomtest(successes, count)
    interval = found.proportion_ci(LEVEL, method="wilson")
    return Rate(successes / count, float(interval.low), float(interval.high), count)


@dataclass(frozen=True)
class Verdict:
    """The raters' preferences.

    Attributes:
        first: label of the first side.
        second: label of the second side.
        outcomes: number of answers for ``first``, ``tie`` and ``second``.
        win_rate: how often the first is preferred; ties count half. Pairs are averaged over their
            raters; bootstrap over the pairs.
        p_value: sign-flip test over the pairs of the hypothesis that neither is preferred.
        over_raters: the win rate with the raters as the sample; needs three raters.
        raters: each rater's win rate without ties, with Wilson's interval.
        decided: the win rate over all answers without ties, with Wilson's interval. It treats
            answers as independent.
        left: the share of the left image in the answers without ties.
        agreement: how often two raters gave a pair the same answer; None with one rater.
        missing: number of missing answers.
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


def evaluate(key: SheetKey, answers: Mapping[str, Answers]) -> Verdict:
    """Unblinds and counts the answers.

    Raises:
        UserError: fewer than two pairs were answered.
    """
    winners = {
        pair.pair: {"tie": "tie", "left": pair.left, "right": _OTHER[pair.left]}
        for pair in key.pairs
    }
    given = pd.DataFrame(
        [
            (rater, pair, choice, winners[pair][choice])
            for rater, choices in answers.items()
            for pair, choice in choices.items()
        ],
        columns=["rater", "pair", "choice", "winner"],
    )
    given["share"] = given["winner"].map(OUTCOMES)
    shares = given.groupby("pair")["share"].mean().to_numpy()
    if len(shares) < 2:
        raise UserError("too few answers; an interval needs at least two answered pairs")
    (win_rate,) = share_intervals(shares[None])
    (p_value,) = sign_flip_p_values(shares[None] - 0.5, tolerance=1e-12)
    by_rater = given.groupby("rater", sort=False)
    return Verdict(
        first=key.first,
        second=key.second,
        outcomes={name: int((given["winner"] == name).sum()) for name in OUTCOMES},
        win_rate=win_rate,
        p_value=float(p_value),
        over_raters=_over_raters(by_rater["share"].mean().to_list()),
        raters={str(rater): _rate(own["winner"], "first") for rater, own in by_rater},
        decided=_rate(given["winner"], "first"),
        left=_rate(given["choice"], "left"),
        agreement=_agreement(answers),
        missing=len(answers) * len(key.pairs) - len(given),
    )


def _rate(values: "pd.Series[str]", wanted: str) -> Rate:
    """The share of ``wanted`` among the values without ties."""
    return wilson(int((values == wanted).sum()), int((values != "tie").sum()))


def _over_raters(rates: list[float]) -> Interval | None:
    if len(rates) < MIN_SEEDS:
        return None
    (found,) = method_intervals([rates])
    return Interval(found.mean, max(0.0, found.low), min(1.0, found.high), "method", found.count)


def _agreement(answers: Mapping[str, Answers]) -> float | None:
    same = [
        one[pair] == two[pair]
        for one, two in combinations(answers.values(), 2)
        for pair in one.keys() & two.keys()
    ]
    return float(np.mean(same)) if same else None
