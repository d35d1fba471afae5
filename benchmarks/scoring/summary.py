"""What a scoring comes to: a mean with its interval for each reward, and for each style."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.statistics import Interval, checkpoint_intervals

ALL = "all"
"""Stands in the column ``style`` for the rows over every prompt."""


@dataclass(frozen=True)
class Line:
    """One line of the summary: a reward over all prompts, or over those of one style.

    ``interval`` is over prompts (label ``checkpoint``), each prompt's images averaged first; None
    with fewer than two prompts.
    """

    reward: str
    style: str
    images: int
    prompts: int
    mean: float
    std: float
    interval: Interval | None


def summarise(scores: pd.DataFrame) -> list[Line]:
    """The lines of the rows that :class:`benchmarks.scoring.engine.Scorer` gave, in their order."""
    lines = []
    for reward, rows in scores.groupby("reward", sort=False):
        lines.append(_line(str(reward), ALL, rows))
        styles = rows["style"].dropna()
        if styles.nunique() > 1:
            lines += [_line(str(reward), str(style), part) for style, part in rows.groupby("style")]
    return lines


def _line(reward: str, style: str, rows: pd.DataFrame) -> Line:
    per_prompt = rows.groupby("prompt_id", sort=False)["score"].mean().to_numpy(np.float64)
    interval = checkpoint_intervals(per_prompt[None])[0] if len(per_prompt) > 1 else None
    values = rows["score"].to_numpy(np.float64)
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return Line(
        reward, style, len(values), len(per_prompt), float(per_prompt.mean()), spread, interval
    )


def as_frame(lines: Sequence[Line]) -> pd.DataFrame:
    """The summary as a table of plain columns."""
    return pd.DataFrame(
        [
            {
                "reward": line.reward,
                "style": line.style,
                "images": line.images,
                "prompts": line.prompts,
                "mean": line.mean,
                "std": line.std,
                "low": None if line.interval is None else line.interval.low,
                "high": None if line.interval is None else line.interval.high,
                "interval": None if line.interval is None else line.interval.label,
            }
            for line in lines
        ]
    )


def show(lines: Sequence[Line], too_long: Mapping[str, Sequence[str]], console: Console) -> None:
    """Prints the summary, and how many prompts were cut at a model's context length."""
    table = Table(title="Mean scores with 95 % intervals over the prompts (of these images)")
    for name in ("reward", "style", "images", "prompts"):
        table.add_column(name)
    for name in ("mean", "95 % interval", "std"):
        table.add_column(name, justify="right")
    for line in lines:
        bounds = "–"
        if line.interval is not None:
            bounds = f"{line.interval.low:.4f} to {line.interval.high:.4f}"
        cells = (line.reward, line.style, str(line.images), str(line.prompts))
        table.add_row(*cells, f"{line.mean:.4f}", bounds, f"{line.std:.4f}")
    console.print(table)
    for reward, ids in too_long.items():
        if ids:
            shown = ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
            console.print(
                f"{reward} reads only the beginning of {len(ids)} prompts, which are too long for "
                f"it: {shown}",
                markup=False,
            )
