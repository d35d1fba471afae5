"""Summary of scores: the mean and its interval for each reward and style."""

import csv
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich.console import Console

from benchmarks.evaluation.statistics import NOTHING, Label, checkpoint_intervals, fixed
from g2rpo.terminal import PlainTable, literal
from g2rpo.text import csv_text

_DIGITS = 4


class Line(NamedTuple):
    """One line of the summary, with statistics over prompts; a prompt's images are averaged first.

    Attributes:
        reward: the reward.
        style: of the prompts; None for all of them.
        images: number of scored images.
        prompts: number of their prompts.
        mean: mean over the prompts.
        std: sample standard deviation over the prompts; None with fewer than two.
        low: lower end of the mean's interval; None with fewer than two prompts.
        high: upper end.
        interval: what the interval is about, ``checkpoint``.
    """

    reward: str
    style: str | None
    images: int
    prompts: int
    mean: float
    std: float | None = None
    low: float | None = None
    high: float | None = None
    interval: Label | None = None


def summarise(scores: pd.DataFrame) -> list[Line]:
    """The summary lines of the rows of a :class:`Scorer`, in order."""
    lines = []
    for reward, rows in scores.groupby("reward", sort=False):
        lines.append(_line(str(reward), None, rows))
        styles = rows["style"].dropna()
        if styles.nunique() > 1:
            lines += [_line(str(reward), str(style), part) for style, part in rows.groupby("style")]
    return lines


def _line(reward: str, style: str | None, rows: pd.DataFrame) -> Line:
    means = rows.groupby("prompt_id", sort=False)["score"].mean().to_numpy(np.float64)
    line = Line(reward, style, len(rows), len(means), float(means.mean()))
    if len(means) < 2:
        return line
    (found,) = checkpoint_intervals(means[None])
    std = float(means.std(ddof=1))
    return line._replace(std=std, low=found.low, high=found.high, interval=found.about)


def as_records(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The summary as JSON values; ``style`` is None for all prompts."""
    return [line._asdict() for line in lines]


def as_frame(lines: Sequence[Line]) -> pd.DataFrame:
    """The summary as a table; ``style`` is empty for all prompts."""
    return pd.DataFrame(as_records(lines))


def exact_csv(scores: pd.DataFrame) -> str:
    """The rows of a :class:`Scorer` as CSV (RFC 4180) that says what they say, for programs.

    Scores have all digits; all text is quoted and unchanged, also where a spreadsheet would take it
    for a formula. A missing value is an empty cell.
    """
    exact = scores.assign(score=scores["score"].astype(float))
    return exact.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\r\n")


def as_csv(frame: pd.DataFrame) -> str:
    """A table as CSV, with text escaped so that spreadsheets do not run formulas."""
    safe = frame.map(lambda value: csv_text(value) if isinstance(value, str) else value)
    return safe.to_csv(index=False)


def show(lines: Sequence[Line], too_long: Mapping[str, Sequence[str]], console: Console) -> None:
    """Prints the summary and the prompts truncated at a model's context length."""
    console.print(literal("Means over prompts, with 95 % intervals (for these images)", "italic"))
    console.print(_table([line for line in lines if line.style is None]))
    by_style = [line for line in lines if line.style is not None]
    if by_style:
        console.print(literal("By style", "italic"))
        console.print(_table(by_style))
    for reward, ids in too_long.items():
        if ids:
            shown = ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
            console.print(literal(f"prompts truncated by {reward} ({len(ids)}): {shown}"))


def _table(lines: Sequence[Line]) -> PlainTable:
    styled = lines[0].style is not None
    names = ("reward", *(("style",) if styled else ()), "images", "prompts")
    table = PlainTable(*names, box=None, pad_edge=False, header_style="bold")
    for name in ("mean", "95 % interval", "std over prompts"):
        table.add_column(name, justify="right")
    for line in lines:
        bounds = [end for end in (line.low, line.high) if end is not None]
        table.add_row(
            line.reward,
            *((line.style,) if styled else ()),
            str(line.images),
            str(line.prompts),
            fixed(line.mean, _DIGITS),
            " to ".join(fixed(bound, _DIGITS) for bound in bounds) or NOTHING,
            NOTHING if line.std is None else fixed(line.std, _DIGITS),
        )
    return table
