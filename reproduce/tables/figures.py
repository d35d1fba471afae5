"""Learning curves: rewards and held-out scores against iterations and cost, over seeds."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks.evaluation.statistics import MIN_SEEDS, method_intervals
from g2rpo.errors import UserError
from g2rpo.files import atomic_path

Horizontal = Literal[
    "iteration", "rollout_evaluations", "seconds", "equal_cost_evaluations", "device_seconds"
]

HORIZONTALS: dict[Horizontal, str] = {
    "iteration": "Iteration",
    "rollout_evaluations": "Rollout evaluations",
}
"""The horizontal axes of a figure, with their labels."""

# The colour-blind safe palette of Okabe and Ito, without its yellow and black. Line styles
# distinguish the curves without colour.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")

FIGURE_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # labels may contain dollar signs
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,  # keeps text as text, as journals require
}
PDF_METADATA = {"Creator": None, "Producer": None, "CreationDate": None}
"""Omitted, so that the same figure gives the same file."""


def curve_style(index: int, *, markers: bool) -> dict[str, Any]:
    """Colour, line style and marker of curve ``index``."""
    # Shifts the styles on every pass through the colours, so that no two curves look alike.
    other = (index + index // len(PALETTE)) % len(LINE_STYLES)
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": LINE_STYLES[other],
        "marker": MARKERS[other] if markers else None,
    }


def save_figure(figure: Figure, output: Path) -> None:
    """Writes a figure as the PNG ``output`` and a PDF beside it."""
    for path, metadata in (
        (output, {"Software": None}),
        (output.with_suffix(".pdf"), PDF_METADATA),
    ):
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)


@dataclass(frozen=True)
class Metric:
    """One quantity over training.

    Attributes:
        key: its key in metrics.jsonl, e.g. ``reward/hps/mean``.
        label: the panel's title.
        smooth: draw a running mean over an eighth of the run, for quantities that are measured
            on different prompts at every iteration.
    """

    key: str
    label: str
    smooth: bool = False


@dataclass(frozen=True)
class Band:
    """A curve over seeds; ``low`` and ``high`` are None with fewer than three seeds."""

    x: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64] | None
    high: npt.NDArray[np.float64] | None


def seed_band(runs: Sequence[pd.DataFrame], metric: Metric, horizontal: Horizontal) -> Band | None:
    """Mean over seeds with its 95% t interval, at the iterations that all seeds have.

    Args:
        runs: one frame per seed, with ``iteration``, the horizontal column and the metric's key.
        metric: what is drawn; each seed is smoothed before the mean.
        horizontal: the horizontal axis, as the mean over seeds.

    Returns:
        The curve, or None if the runs share no iteration with this metric.
    """
    series = []
    for run in runs:
        if metric.key not in run or horizontal not in run:
            return None
        part = run.set_index("iteration", drop=False)[[horizontal, metric.key]].dropna()
        if metric.smooth:
            window = max(1, math.ceil(len(part) / 8))
            part[metric.key] = (
                part[metric.key].rolling(window, center=True, min_periods=window // 2 + 1).mean()
            )
            part = part.dropna()
        series.append(part)
    joined = pd.concat(series, axis=1, join="inner", keys=range(len(series)))
    if joined.empty:
        return None
    x = joined.xs(horizontal, axis=1, level=1).to_numpy(np.float64).mean(axis=1)
    values = joined.xs(metric.key, axis=1, level=1).to_numpy(np.float64)
    if len(runs) < MIN_SEEDS:
        return Band(x, values.mean(axis=1), None, None)
    intervals = method_intervals(values)
    low, high = (np.array([getattr(i, end) for i in intervals]) for end in ("low", "high"))
    return Band(x, values.mean(axis=1), low, high)


def learning_curves(
    curves: Mapping[str, Sequence[pd.DataFrame]],
    metrics: Sequence[Metric],
    output: Path,
    title: str | None = None,
) -> Path:
    """Draws learning curves, with one row of panels per metric and one column per horizontal axis.

    Args:
        curves: method label to one frame per seed (:func:`read_metrics`), in drawing order.
        metrics: the quantities.
        output: the PNG to write, which is returned; a PDF is written beside it.
        title: title of the figure.

    Raises:
        UserError: the runs have none of the metrics.
    """
    panels = [
        [
            {
                label: band
                for label, runs in curves.items()
                if runs and (band := seed_band(runs, metric, horizontal)) is not None
            }
            for horizontal in HORIZONTALS
        ]
        for metric in metrics
    ]
    if not any(panel for row in panels for panel in row):
        names = ", ".join(metric.key for metric in metrics)
        raise UserError(f"{output}: no learning curve to draw; no run has {names}")
    styles = {label: index for index, label in enumerate(curves)}
    with matplotlib.rc_context(FIGURE_STYLE):
        size = (0.6 + 3.9 * len(HORIZONTALS), 0.9 + 2.3 * len(metrics))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(metrics), len(HORIZONTALS), squeeze=False, sharey="row")
        for metric, row, axes_row in zip(metrics, panels, grid, strict=True):
            for horizontal, panel, axes in zip(HORIZONTALS, row, axes_row, strict=True):
                for label, band in panel.items():
                    style = curve_style(styles[label], markers=len(band.x) <= 30)
                    style |= {"label": label, "markersize": 3.5, "linewidth": 1.5}
                    draw_band(axes, band, style, alpha=0.13)
                _scale(axes, horizontal, list(panel.values()))
            note = " (running mean)" if metric.smooth else ""
            axes_row[0].set_title(metric.label + note, loc="left", fontweight="bold")
            limit_height(axes_row[0], [band for panel in row for band in panel.values()])
        _legend(figure, grid.ravel(), _caption(curves), title)
        save_figure(figure, output)
    return output


def draw_band(axes: Axes, band: Band, style: Mapping[str, Any], alpha: float) -> None:
    """Draws a curve in a style, and its band with an opacity of ``alpha``."""
    axes.plot(band.x, band.mean, **style)
    if band.low is not None and band.high is not None:
        axes.fill_between(
            band.x, band.low, band.high, color=style["color"], alpha=alpha, linewidth=0
        )


def _scale(axes: Axes, horizontal: Horizontal, bands: Sequence[Band]) -> None:
    ends = [float(band.x[-1]) for band in bands]
    starts = [float(band.x[0]) for band in bands]
    label = HORIZONTALS[horizontal]
    # A log scale separates curves of very different cost.
    if horizontal != "iteration" and bands and max(ends) > 3 * min(ends) and min(starts) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        label += " (log scale)"
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=horizontal == "iteration"))
        axes.set_xlim(left=0)
    if horizontal != "iteration":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(label)


def limit_height(axes: Axes, bands: Sequence[Band]) -> None:
    """Keeps one wide band (three seeds that disagree) from flattening every curve."""
    if not bands:
        return
    values = np.concatenate([band.mean for band in bands])
    low, high = float(values.min()), float(values.max())
    room = 0.6 * ((high - low) or max(abs(high), 1.0) * 0.05)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - room), min(top, high + room))


def seeds_text(counts: Collection[int]) -> tuple[str, str]:
    """Numbers of seeds as a range, and what bands over them are."""
    least, most = min(counts), max(counts)
    bands = "; bands: 95% t intervals over seeds" if most >= MIN_SEEDS else ""
    return f"{least}" if least == most else f"{least} to {most}", bands


def _caption(curves: Mapping[str, Sequence[pd.DataFrame]]) -> str:
    seeds, bands = seeds_text([len(runs) for runs in curves.values() if runs])
    return "One seed" if seeds == "1" else f"Mean over {seeds} seeds{bands}"


def _legend(figure: Figure, panels: Iterable[Axes], caption: str, title: str | None) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    most = min(len(entries), 6 if figure.get_figwidth() > 7 else 3)
    for columns in range(most, 0, -1):
        legend = figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower center",
            ncols=columns,
            title=caption,
            title_fontsize=8,
            handlelength=2.8,
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    if title is not None:
        figure.suptitle(title, fontsize=11)
