"""Publishes an experiment on credit: tables by step, a figure, and the numbers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evaluation.credit import RolloutCredit
from benchmarks.evaluation.statistics import MIN_SEEDS, method_intervals
from g2rpo.files import atomic_write_text, write_json
from g2rpo.terminal import literal, plain_table, wide_console
from reproduce.experiment import Experiment, Profile, ResolvedCell
from reproduce.experiment.layout import Layout
from reproduce.runs.folders import read_manifest
from reproduce.tables.figures import FIGURE_STYLE, curve_style, save_figure
from reproduce.tables.markdown import markdown_escape, markdown_table
from reproduce.tables.model import Number
from reproduce.tables.notes import Gap

EXPLAINED = "Share of the reward's variance explained by the step's noise"
RATIO = "Signal-to-noise ratio of the step's gradient, one iteration"
ALL_STEPS = "all"
"""Stands for a step in the gradient over all trained steps."""
EXPLANATIONS = (
    (
        "Measured on the untrained policy, with each method's own rollout on the same prompts. See "
        "docs/mathematics.md for definitions."
    ),
    (
        "Share of variance: correlation between the rewards of two samples that share only this "
        "step's noise. It is 1 by construction if noise enters at a single step."
    ),
    (
        "Signal-to-noise ratio: squared norm of the mean gradient divided by the mean squared "
        "distance from it, over groups redrawn for the same prompts. Estimates near 0 may be "
        "negative."
    ),
    (
        "A method with a moving window of stochastic steps has one line per rollout, named after "
        "these steps. A window at the end of the grid may have a single step."
    ),
)

Step = int | str
"""The index of a step, or :data:`ALL_STEPS`."""
Quantity = dict[str, dict[Step, Number]]
"""A number over seeds, by line and step."""


class Measured(NamedTuple):
    """One cell at one seed, and the manifest of its measurement."""

    row: str
    label: str
    seed: int
    manifest: Mapping[str, Any]


def named_rollouts(cell: Measured) -> list[tuple[str, RolloutCredit]]:
    """The cell's rollouts by iteration, each with the label of its line.

    A method's rollouts are not averaged: the variance that one step explains depends on which
    other steps are stochastic.
    """
    rollouts = [RolloutCredit.of(one) for one in cell.manifest["rollouts"]]
    rollouts.sort(key=lambda rollout: rollout.iteration)
    if len(rollouts) == 1:
        return [(cell.label, rollouts[0])]
    windows = [steps_text([step.step for step in one.steps]) for one in rollouts]
    found = []
    for window, rollout in zip(windows, rollouts, strict=True):
        # Rollouts over the same steps differ in something else.
        more = "" if windows.count(window) == 1 else f", iteration {rollout.iteration}"
        found.append((f"{cell.label}, {window}{more}", rollout))
    return found


def steps_text(steps: Sequence[int]) -> str:
    """``step 5``, ``steps 2 to 5`` if they are consecutive, else ``steps 0, 2, 5``."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    first, last = steps[0], steps[-1]
    whole = list(steps) == list(range(first, last + 1))
    return f"steps {first} to {last}" if whole else f"steps {', '.join(map(str, steps))}"


def over_seeds(values: Iterable[tuple[str, Step, float]]) -> Quantity:
    """The mean and interval over seeds of (line, step, value)."""
    gathered: dict[str, dict[Step, list[float]]] = {}
    for label, step, value in values:
        gathered.setdefault(label, {}).setdefault(step, []).append(value)
    return {
        label: {
            step: Number(mean=float(np.mean(found)), count=len(found))
            if len(found) < MIN_SEEDS
            else Number(**vars(method_intervals([found])[0]))
            for step, found in by_step.items()
        }
        for label, by_step in gathered.items()
    }


def quantities_of(measured: Sequence[Measured], rewards: Sequence[str]) -> dict[str, Quantity]:
    """The shares of each reward's variance and the signal-to-noise ratios, by title."""
    lines = [line for cell in measured for line in named_rollouts(cell)]
    found = {
        f"{EXPLAINED} ({reward})": over_seeds(
            (label, step.step, step.explained[reward]) for label, at in lines for step in at.steps
        )
        for reward in rewards
    }
    ratios: list[tuple[str, Step, float]] = []
    for label, at in lines:
        ratios += [(label, step.step, step.ratio) for step in at.steps]
        ratios.append((label, ALL_STEPS, at.ratio))
    return found | {RATIO: over_seeds(ratios)}


def _steps(quantity: Quantity) -> list[Step]:
    """All steps of any line in order, the gradient over all steps last."""
    steps = {step for row in quantity.values() for step in row}
    return sorted(steps, key=lambda step: (isinstance(step, str), step))


def publish_credit(
    experiment: Experiment,
    profile: Profile,
    cells: Sequence[ResolvedCell],
    gaps: Sequence[Gap],
    layout: Layout,
) -> None:
    """Writes and prints the measurements of ``cells``; ``gaps`` says why others are missing."""
    spec = experiment.table_spec(profile)
    labels = {row.key: row.label for row in spec.rows}
    measured: list[Measured] = []
    for cell in sorted(cells, key=lambda cell: (list(labels).index(cell.key), cell.seed or 0)):
        manifest = read_manifest(layout.credit(cell))
        assert manifest is not None
        measured.append(Measured(cell.key, labels[cell.key], cell.seed or 0, manifest))
    if not measured:
        return
    quantities = quantities_of(measured, [column.reward for column in spec.columns])
    output = layout.experiment(profile.name, experiment.name)
    text = credit_markdown(experiment, profile.name, quantities, gaps)
    atomic_write_text(output / "credit.md", text)
    atomic_write_text(output / "credit.csv", credit_csv(measured))
    write_json(output / "credit.json", _document(experiment, profile, measured))
    _figure(quantities, measured, output / "credit.png")
    _print(experiment.table.title, quantities)
    for path in sorted(output.glob("credit.*")):
        typer.echo(f"wrote {path}")


def _print(title: str, quantities: Mapping[str, Quantity]) -> None:
    console = wide_console()
    for name, quantity in quantities.items():
        steps = _steps(quantity)
        heads = [str(step) for step in steps]
        table = plain_table("method", *heads, right=heads)
        console.print(literal(f"{title}: {name}, by step", "italic"))
        for label, row in quantity.items():
            table.add_row(
                label, *(f"{row[step].mean:.3f}" if step in row else "" for step in steps)
            )
        console.print(table)
        console.print()


def credit_markdown(
    experiment: Experiment, profile: str, quantities: Mapping[str, Quantity], gaps: Sequence[Gap]
) -> str:
    """A table per quantity, with notes."""
    parts = [f"### {markdown_escape(experiment.table.title)} (profile `{profile}`)"]
    for name, quantity in quantities.items():
        steps = _steps(quantity)
        heads = [("Method", "---"), *((str(step), "---:") for step in steps)]
        lines = [
            [markdown_escape(label), *(_shown(row.get(step)) for step in steps)]
            for label, row in quantity.items()
        ]
        parts += [f"**{name}**", markdown_table(heads, lines)]
    numbers = [n for found in quantities.values() for row in found.values() for n in row.values()]
    fewest = min(number.count or 0 for number in numbers)
    over = (
        f"Mean over {fewest} seeds with 95% t interval."
        if fewest >= MIN_SEEDS
        else f"{fewest} seed{'s' if fewest > 1 else ''}: too few for an interval."
    )
    settings = experiment.credit
    assert settings is not None
    how = (
        f"{settings.samples} pairs per prompt and step; {settings.repeats} groups per prompt for "
        f"the gradients; at most {settings.rollouts} rollouts per method."
    )
    missing = [f"Missing: {gap.row}, seed {gap.seed}: {gap.reason}" for gap in gaps]
    parts.append("\n".join(f"- {note}" for note in (*EXPLANATIONS, over, how, *missing)))
    return "\n\n".join(parts) + "\n"


def _shown(number: Number | None) -> str:
    if number is None:
        return ""
    interval = f"<br><sub>[{number.low:.3f}, {number.high:.3f}]</sub>" if number.ends else ""
    return f"{number.mean:.3f}{interval}"


def credit_csv(measured: Sequence[Measured]) -> str:
    """One line per stochastic step of every rollout."""
    lines = [
        {
            "row": cell.row,
            "seed": cell.seed,
            "iteration": rollout["iteration"],
            "step": step["step"],
            "sigma": step["sigma"],
            **{f"explained_{name}": step["explained"][name] for name in sorted(step["explained"])},
            "signal": step["signal"],
            "noise": step["noise"],
        }
        for cell in measured
        for rollout in cell.manifest["rollouts"]
        for step in rollout["steps"]
    ]
    return pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")


def _document(
    experiment: Experiment, profile: Profile, measured: Sequence[Measured]
) -> dict[str, Any]:
    assert experiment.credit is not None
    parts = ("inputs", "provenance", "rollouts")
    return {
        "experiment": experiment.name,
        "profile": profile.name,
        "settings": experiment.credit.model_dump(mode="json"),
        "cells": [
            {"row": cell.row, "seed": cell.seed, **{part: cell.manifest[part] for part in parts}}
            for cell in measured
        ],
    }


def _figure(quantities: Mapping[str, Quantity], measured: Sequence[Measured], path: Path) -> None:
    """A panel per quantity, with its value at every step and bands over seeds."""
    rollouts = [rollout for cell in measured for _, rollout in named_rollouts(cell)]
    sigmas = {step.step: step.sigma for rollout in rollouts for step in rollout.steps}
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(4.4 * len(quantities), 3.6), layout="constrained")
        panels = figure.subplots(1, len(quantities), squeeze=False)[0]
        for axes, (name, quantity) in zip(panels, quantities.items(), strict=True):
            draw_quantity(axes, quantity, sigmas)
            axes.set_title(name, wrap=True)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)
        save_figure(figure, path)


def draw_quantity(axes: Axes, quantity: Quantity, sigmas: Mapping[int, float]) -> None:
    """Draws each line, with a band if every step has an interval."""
    for index, (label, row) in enumerate(quantity.items()):
        steps = [step for step in sorted(sigmas) if step in row]
        numbers = [row[step] for step in steps]
        style = curve_style(index, markers=True)
        axes.plot(steps, [n.mean for n in numbers], label=label, markersize=4, **style)
        ends = [(n.low, n.high) for n in numbers if n.low is not None and n.high is not None]
        if len(ends) == len(steps):
            low, high = zip(*ends, strict=True)
            if len(steps) > 1:
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, lw=0)
            else:  # a band over one step has no width
                axes.vlines(steps, low, high, color=style["color"], alpha=0.5)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xticks(sorted(sigmas), [f"{k}\nσ {sigmas[k]:.2f}" for k in sorted(sigmas)])
    axes.set_xlabel("Stochastic step")
