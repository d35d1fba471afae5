"""The figure ``frontier``: the in-domain reward during training against what it has cost so far."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from benchmarks.evaluation.results import Cell
from g2rpo.training.checkpoint.folder import equal_cost
from reproduce.tables.figures import (
    FIGURE_STYLE,
    Band,
    Metric,
    curve_style,
    draw_band,
    limit_height,
    save_figure,
    seed_band,
    seeds_text,
)
from reproduce.tables.headroom import IN_DOMAIN
from reproduce.tables.model import COST_LABELS, Row, Table, grouped
from reproduce.tables.notes import full_label

COSTS: tuple[Literal["equal_cost_evaluations", "device_seconds"], ...] = (
    "equal_cost_evaluations",
    "device_seconds",
)
"""The cost on the horizontal axis of each panel."""
SPENT = ("rollout_evaluations", "training_forwards", "training_backwards", "device_seconds")
"""The columns of a learning curve from which costs are computed; runs without them are left out."""
Runs = dict[str, dict[int | None, pd.DataFrame]]
"""Learning curves with every cost, by row and seed."""
COLOURS = "tab20"
"""Twenty colours, one per row; the number at a curve's end also names its row."""
PARETO: dict[str, Any] = {
    "linestyle": "", "marker": "o", "mfc": "none", "mec": "0.2", "markersize": 6, "mew": 0.8,
}  # fmt: skip


def pareto_points(curves: Sequence[Band]) -> list[list[int]]:
    """The points of each curve that no point of any curve dominates, by index.

    A point is dominated if another costs no more and has at least its mean, and differs in one.
    The starts, where nothing has been spent, dominate but are left out.
    """
    points = [(x, y) for c in curves for x, y in zip(c.x, c.mean, strict=True)]

    def dominated(cost: float, reward: float) -> bool:
        return any(x <= cost and y >= reward and (x, y) != (cost, reward) for x, y in points)

    return [
        [
            index
            for index, (x, y) in enumerate(zip(curve.x, curve.mean, strict=True))
            if x > 0 and not dominated(x, y)
        ]
        for curve in curves
    ]


def frontier_figure(table: Table, cells: Iterable[Cell], output: Path) -> Path | None:
    """Draws validation rewards against cost, with a panel per reward and cost.

    The legend has each row's share of the in-domain headroom on held-out prompts or, where there is
    no headroom, its in-domain score. Returns ``output``, a PNG; a PDF is written beside it.
    None if no cell has validation rewards and their cost.
    """
    rows, runs = runs_with_costs(table, cells)
    compared = compared_rows(table, rows, runs)
    if not compared:
        return None
    found = {key: [*seeds.values()] for key, seeds in runs.items()}
    with matplotlib.rc_context(FIGURE_STYLE):
        lines = -(-len(rows) // 3)
        size = (10.0, 3.6 * len(compared) + 0.4 + 0.19 * lines)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(compared), len(COSTS), squeeze=False, sharey="row")
        for (reward, label, members), panels in zip(compared, grid, strict=True):
            for cost, axes in zip(COSTS, panels, strict=True):
                bands = {
                    row.key: seed_band(found[row.key], Metric(f"validation/{reward}", ""), cost)
                    for row in members
                }
                _draw(axes, rows, {key: band for key, band in bands.items() if band is not None})
                axes.set_xlabel(COST_LABELS[cost])
            panels[0].set_ylabel(f"{label}, validation prompts")
        _legend(figure, rows, [len(found[row.key]) for row in rows])
        figure.suptitle(table.title, fontsize=11)
        save_figure(figure, output)
    return output


def runs_with_costs(table: Table, cells: Iterable[Cell]) -> tuple[list[Row], Runs]:
    """The trained rows whose cells have learning curves with costs, and those curves."""
    runs: Runs = {}
    for cell in cells:
        if cell.curve is not None and {*SPENT} <= {*cell.curve}:
            runs.setdefault(cell.info.row, {})[cell.info.seed] = _with_costs(cell.curve)
    return [row for row in table.rows if row.trained_on and row.key in runs], runs


def compared_rows(
    table: Table, rows: Sequence[Row], runs: Runs
) -> list[tuple[str, str, list[Row]]]:
    """Each validated training reward of each group of ``rows``.

    Its name, its label with the group's if there are several, and the rows with its curves.
    """
    found, several = [], len({row.group for row in rows}) > 1
    for group, members in grouped(rows):
        for reward in dict.fromkeys(name for row in members for name in row.trained_on):
            key = f"validation/{reward}"
            validated = [
                row
                for row in members
                if reward in row.trained_on
                and all(key in run and run[key].notna().any() for run in runs[row.key].values())
            ]
            if validated:
                label = table.column(reward).label
                group_of = f" ({table.group_label.lower()} {group})" if several else ""
                found.append((reward, label + group_of, validated))
    return found


def _with_costs(curve: pd.DataFrame) -> pd.DataFrame:
    """A learning curve with every cost; the row before the first iteration has spent nothing."""
    costs = curve[[*SPENT]].where(curve["iteration"] > 0, 0.0)
    spent = {name: costs[name] for name in SPENT}
    return curve.assign(**spent, equal_cost_evaluations=equal_cost(costs))


def _draw(axes: Axes, rows: Sequence[Row], bands: Mapping[str, Band]) -> None:
    """Draws the curves of one panel, each with the number of its row at its end."""
    best: list[tuple[float, float]] = []
    ends: list[tuple[float, float, int]] = []
    for (key, band), places in zip(bands.items(), pareto_points([*bands.values()]), strict=True):
        number = [row.key for row in rows].index(key)
        draw_band(axes, band, _style(number), alpha=0.08)
        best += [(float(band.x[place]), float(band.mean[place])) for place in places]
        ends.append((float(band.mean[-1]), float(band.x[-1]), number))
    axes.plot(*zip(*sorted(best), strict=True), **PARETO)
    limit_height(axes, [*bands.values()])
    axes.set_xlim(0, 1.06 * max(x for _, x, _ in ends))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _number(axes, sorted(ends))


def _number(axes: Axes, ends: Sequence[tuple[float, float, int]]) -> None:
    """Writes the numbers of rows at their curves' ends (height, cost, row), in ascending order."""
    width, height = (0.04 * (high - low) for low, high in (axes.get_xlim(), axes.get_ylim()))
    placed: list[tuple[float, float]] = []
    for y, x, _ in ends:  # above all numbers that it would cover
        placed.append((max([y, *(h + height for h, at in placed if abs(at - x) < width)]), x))
    lifted = sum(h - y for (h, _), (y, _, _) in zip(placed, ends, strict=True)) / len(ends)
    for (h, x), (_, _, number) in zip(placed, ends, strict=True):
        colour, text = _style(number)["color"], f" {number + 1}"
        axes.text(x, h - lifted, text, color=colour, fontsize=7.5, va="center")


def _style(number: int) -> dict[str, Any]:
    colours = matplotlib.colormaps[COLOURS]
    place = (2 * number + number // 10) % colours.N  # its dark colours first
    return curve_style(number, markers=False) | {"color": colours(place), "linewidth": 1.4}


def _legend(figure: Figure, rows: Sequence[Row], runs: Collection[int]) -> None:
    """Names the rows by number, with their held-out scores from the table."""
    handles = [Line2D([], [], **_style(number)) for number in range(len(rows))]
    several = len({row.group for row in rows}) > 1
    labels = [full_label(row) if several else row.label for row in rows]
    names = [
        f"{number}  {label}{_held_out(row)}"
        for number, (label, row) in enumerate(zip(labels, rows, strict=True), start=1)
    ]
    measure = "in-domain headroom" if any(row.headroom for row in rows) else "in-domain score"
    seeds, bands = seeds_text(runs)
    figure.legend(
        [*handles, Line2D([], [], **PARETO)],
        [*names, "Pareto set of the means"],
        loc="outside lower center",
        ncols=3,
        fontsize=7.5,
        title=f"With the {measure} on held-out prompts; seeds of a row: {seeds}{bands}",
        title_fontsize=8,
        handlelength=2.8,
    )


def _held_out(row: Row) -> str:
    scores = [row.scores[name] for name in row.trained_on if name in row.scores]
    if IN_DOMAIN in row.headroom:
        return f": {row.headroom[IN_DOMAIN].text}"
    return f": {', '.join(score.text for score in scores)}" if scores else ""
