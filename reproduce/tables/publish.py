"""Publishes an experiment: tables, learning curves, image grids and a summary."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import typer
from PIL import Image

from benchmarks.evaluation.held_out import image_path
from benchmarks.evaluation.results import Cell
from g2rpo.files import atomic_write_text
from g2rpo.text import visible
from reproduce.experiment import Experiment, Profile, ResolvedCell, resolve
from reproduce.experiment.layout import Layout
from reproduce.tables.collecting import collect_all
from reproduce.tables.credit import publish_credit
from reproduce.tables.equal_cost import equal_cost_markdown
from reproduce.tables.figures import Metric, learning_curves
from reproduce.tables.formats import write_formats
from reproduce.tables.frontier import frontier_figure
from reproduce.tables.notes import Gap, full_label
from reproduce.tables.picture_grid import picture_grid
from reproduce.tables.table import compute_table
from reproduce.tables.terminal import print_table

PICTURED_PROMPTS = 6


def publish_cells(
    experiment: Experiment,
    profile: Profile,
    cells: Sequence[ResolvedCell],
    gaps: list[Gap],
    layout: Layout,
) -> None:
    """Collects finished cells and publishes them.

    ``gaps`` says why others are missing; cells with unreadable results are appended.
    """
    if experiment.credit is not None:
        publish_credit(experiment, profile, cells, gaps, layout)
        return
    found, damaged = collect_all(cells, layout, experiment.name)
    gaps += damaged
    publish(experiment, profile, found, gaps, layout)


def publish(
    experiment: Experiment,
    profile: Profile,
    cells: Sequence[Cell],
    gaps: Sequence[Gap],
    layout: Layout,
) -> None:
    """Writes the table and figures of finished ``cells``, and prints the table."""
    output = layout.experiment(profile.name, experiment.name)
    spec = experiment.table_spec(profile)
    table = compute_table(spec, cells, profile.name, gaps)
    written = list(write_formats(table, output).values())
    print_table(table)
    figures: list[Path | None] = []
    if "frontier" in spec.figures:
        figures.append(frontier_figure(table, cells, output / "frontier.png"))
        if figures[-1] is not None:
            written.append(output / f"{experiment.name}_equal_cost.md")
            atomic_write_text(written[-1], equal_cost_markdown(table, cells, spec.focus))
    for group, rows in spec.groups():
        curves = {
            row.label: [c.curve for c in cells if c.info.row == row.key and c.curve is not None]
            for row in rows
        }
        figures.append(_curves(curves, rows[0].train, output, group))
    if cells and experiment.trains and not any(figures):
        typer.echo(
            "no learning curves: no run has validation rewards; they need validation_prompts "
            "above 0 in the profile"
        )
    figures.append(_pictures(experiment, profile, cells, layout, output))
    for figure in figures:
        if figure is not None:
            written += [figure, figure.with_suffix(".pdf")]
    for path in written:
        typer.echo(visible(f"wrote {path}"))


def _curves(
    curves: dict[str, list[pd.DataFrame]], rewards: Sequence[str], output: Path, group: str
) -> Path | None:
    """Draws the validation rewards of one group's rows over training."""
    known = {label: runs for label, runs in curves.items() if runs}
    metrics = [
        Metric(f"validation/{reward}", f"{reward}, validation prompts")
        for reward in rewards
        if any(f"validation/{reward}" in run for runs in known.values() for run in runs)
    ]
    if not known or not metrics:
        return None
    stem = re.sub(r"[^a-z0-9]+", "_", group.lower()).strip("_") or "all"
    path = output / f"curves_{stem}.png"
    return learning_curves(known, metrics, path, title=group or None)


def _pictures(
    experiment: Experiment,
    profile: Profile,
    cells: Sequence[Cell],
    layout: Layout,
    output: Path,
) -> Path | None:
    """Draws the same prompts and noise under the base and the rows of the first trained group."""
    spec = experiment.table_spec(profile)
    trained_groups = [name for name, rows in spec.groups() if any(row.train for row in rows)]
    shown = [row for row in spec.rows if not row.train or row.group == trained_groups[0]]
    columns = {}
    prompts = None
    kept = profile.keep_images
    count = PICTURED_PROMPTS if kept is None else min(PICTURED_PROMPTS, kept)
    for row in shown:
        info = next((cell.info for cell in cells if cell.info.row == row.key), None)
        if info is None:
            continue
        run = layout.runs / info.runs["train"]
        folder = run / "evaluations" / info.runs["evaluation"] / "images"
        if not folder.is_dir():
            continue
        if prompts is None:
            resolved = resolve(experiment, profile, row.key, info.seed or 0)
            prompts = resolved.held_out_prompts()[:count]
        paths = [image_path(folder, prompt) for prompt in prompts]
        if all(path.exists() for path in paths):
            columns[full_label(row)] = [np.array(Image.open(path)) for path in paths]
    if not prompts or not columns:
        return None
    return picture_grid(columns, [prompt.text for prompt in prompts], output / "pictures.png")
