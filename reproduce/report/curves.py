"""Learning curves for the page: means and bands over seeds, against three axes."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from reproduce.experiment.table import TableSpec
from reproduce.report.chapter import Chapter
from reproduce.tables.figures import Band, Horizontal, Metric, seed_band

AXES: dict[Horizontal, str] = {
    "iteration": "Iterations",
    "rollout_evaluations": "Velocity evaluations in rollouts",
    "seconds": "Seconds of training",
}
_METRICS = (
    (r"validation/(.+)", "{}, validation prompts", False),
    (r"reward/(.+)/mean", "{} of the training samples", True),
    (r"reward/(.+)/group_std", "{}, standard deviation in a group", True),
    (r"advantage/absolute_mean", "Mean absolute advantage", True),
    (r"loss", "Loss", True),
    (r"gradient_norm", "Gradient norm before clipping", True),
    (r"clipped_fraction", "Fraction of clipped ratios", True),
    (r"kl", "KL to the base", True),
)
"""Pattern of a metric's key, its label, and whether a running mean is drawn."""


def metrics_of(frames: Sequence[pd.DataFrame], labels: dict[str, str]) -> list[Metric]:
    """The metrics of these runs, validation rewards first; those that are always 0 are omitted."""
    keys = list(dict.fromkeys(str(key) for frame in frames for key in frame))
    found = []
    for pattern, name, smooth in _METRICS:
        for key in keys:
            match = re.fullmatch(pattern, key)
            if match is None or not any(key in f and f[key].any() for f in frames):
                continue
            shown = name.format(*(labels.get(group, group) for group in match.groups()))
            found.append(Metric(key, shown, smooth=smooth))
    return found


def curve_data(chapter: Chapter) -> dict[str, Any] | None:
    """The curves of a chapter as JSON; None if no run has any.

    Each row and metric has its mean, the ends of the band (only with three seeds) and the position
    of each point on every axis.
    """
    spec: TableSpec = chapter.spec
    labels = {column.reward: column.label for column in spec.columns}
    runs = {
        row.key: [c.curve for c in chapter.cells if c.info.row == row.key and c.curve is not None]
        for row in spec.rows
    }
    metrics = metrics_of([frame for frames in runs.values() for frame in frames], labels)
    names = list(dict.fromkeys(row.label for row in spec.rows if runs[row.key]))
    groups = []
    for group, rows in spec.groups():
        lines = [
            {
                "label": row.label,
                "style": names.index(row.label),
                "seeds": len(runs[row.key]),
                "series": _series(runs[row.key], metrics),
            }
            for row in rows
            if runs[row.key]
        ]
        if lines:
            groups.append({"label": group, "lines": lines})
    if not groups or not metrics:
        return None
    return {
        "metrics": [{"key": m.key, "label": m.label, "smooth": m.smooth} for m in metrics],
        "axes": [{"key": key, "label": label} for key, label in AXES.items()],
        "names": names,
        "groups": groups,
    }


def _series(runs: Sequence[pd.DataFrame], metrics: Sequence[Metric]) -> dict[str, Any]:
    found = {}
    for metric in metrics:
        bands = {axis: seed_band(runs, metric, axis) for axis in AXES}
        first = bands["iteration"]
        if first is None:
            continue
        places = {
            axis: _rounded(band.x)
            for axis, band in bands.items()
            if band is not None and len(band.x) == len(first.x)
        }
        found[metric.key] = {"x": places, "y": _rounded(first.mean), **_ends(first)}
    return found


def _ends(band: Band) -> dict[str, list[float]]:
    if band.low is None or band.high is None:
        return {}
    return {"low": _rounded(band.low), "high": _rounded(band.high)}


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in np.asarray(values, dtype=np.float64)]
