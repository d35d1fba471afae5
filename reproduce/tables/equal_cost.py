"""The figure ``frontier`` in numbers: validation rewards where all runs have cost the same."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from benchmarks.evaluation.results import Cell
from benchmarks.evaluation.statistics import (
    MIN_SEEDS,
    NOTHING,
    Comparison,
    corrected,
    human,
    method_comparisons,
    method_intervals,
    p_text,
    signed,
)
from reproduce.tables.frontier import COSTS, compared_rows, runs_with_costs
from reproduce.tables.markdown import markdown_escape, markdown_table
from reproduce.tables.model import COST_LABELS, Number, Table

_NOTE = (
    "Validation rewards at the largest cost that every run has reached, linear between "
    "validations. 95% t intervals over seeds. Differences are paired by seed, with t-tests; "
    f"p (Holm) is corrected over a table. Dashes: fewer than {MIN_SEEDS} seeds."
)


def equal_cost_markdown(table: Table, cells: Iterable[Cell], focus: Sequence[str]) -> str:
    """A table per reward of a group and cost: its trained rows, best first, and their differences
    from the ``focus`` rows. ``cells`` have the learning curves.
    """
    rows, runs = runs_with_costs(table, cells)
    parts = [
        f"### {markdown_escape(table.title)}: at equal cost (profile `{table.profile}`)",
        _NOTE,
    ]
    for reward, label, members in compared_rows(table, rows, runs):
        key, column = f"validation/{reward}", table.column(reward)
        curves = {
            (row.key, seed): run[[*COSTS, key]].dropna()
            for row in members
            for seed, run in runs[row.key].items()
        }
        for cost in COSTS:
            most = min(curve[cost].max() for curve in curves.values())
            values = pd.Series(
                {name: np.interp(most, curve[cost], curve[key]) for name, curve in curves.items()}
            ).unstack()
            title = f"{label} at {human(most)} {COST_LABELS[cost].lower()}"
            found = _rows(
                table, values, [row for row in focus if row in values.index], column.digits
            )
            parts += [f"**{markdown_escape(title)}**", found]
    return "\n\n".join(parts) + "\n"


def _rows(table: Table, values: pd.DataFrame, focus: Sequence[str], digits: int) -> str:
    """The rows of ``values`` [rows, seeds] with their differences from the focus rows."""
    found = {
        (row, other): comparison
        for other in focus
        for row in values.index
        if row != other and (comparison := _comparison(values.loc[[row, other]])) is not None
    }
    p_values = corrected({frozenset(pair): one for pair, one in found.items()})
    heads = [("Row", "---"), ("Seeds", "---:"), ("Mean", "---:"), ("95% interval", "---:")]
    for other in focus:
        heads += [(f"Versus {table.row(other).label}", "---:"), ("p (Holm)", "---:")]
    lines = []
    for row in values.mean(axis=1).sort_values(ascending=False, kind="stable").index:
        scores = values.loc[row].dropna().to_numpy()
        mean = Number(mean=scores.mean(), digits=digits)
        if len(scores) >= MIN_SEEDS:
            (interval,) = method_intervals(scores[None])
            mean = Number(**vars(interval), digits=digits)
        texts = [table.row(row).label, str(len(scores)), mean.text, mean.ends or NOTHING]
        for other in focus:
            if (one := found.get((row, other))) is None:
                texts += [NOTHING, NOTHING]
            else:
                texts += [_difference(one, digits), p_text(p_values[frozenset((row, other))])]
        lines.append([markdown_escape(text) for text in texts])
    return markdown_table(heads, lines)


def _comparison(pair: pd.DataFrame) -> Comparison | None:
    """The first row minus the second over the seeds that both have; None with too few."""
    first, second = pair.dropna(axis=1).to_numpy()
    if len(first) < MIN_SEEDS:
        return None
    return method_comparisons(first[None], second[None])[0]


def _difference(one: Comparison, digits: int) -> str:
    low, high = signed(one.low, digits), signed(one.high, digits)
    return f"{signed(one.difference, digits)} [{low}, {high}]"
