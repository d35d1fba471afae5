"""What an experiment on credit leaves for people: tables by step, a figure, the numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
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
from reproduce.tables.formats import csv_table
from reproduce.tables.markdown import markdown_escape, markdown_table
from reproduce.tables.model import Number, interval_fields
from reproduce.tables.notes import Gap

EXPLAINED = "Share of the reward's variance that the step's noise explains"
RATIO = "Signal-to-noise ratio of the step's gradient, one iteration"
ALL_STEPS = "all"
"""In the place of a step: the gradient over all trained steps."""
EXPLANATIONS = (
    (
        "Measured on the untrained policy, for every method's own rollout on the same prompts; "
        "docs/mathematics.md has the definitions."
    ),
    (
        "Share of variance: correlation of the rewards of two samples that share this step's noise "
        "and nothing else. It is 1 where noise enters at one step alone, by construction."
    ),
    (
        "Signal-to-noise ratio: squared length of the mean gradient over the mean squared distance "
        "from it, over groups drawn again for the same prompts. Estimates near 0 may be below it."
    ),
    (
        "A method whose window of noisy steps moves has a line for each of its rollouts, named by "
        "these steps; a window at the end of the grid may hold one step alone."
    ),
)


Step = int | str
"""The index of a step, or :data:`ALL_STEPS`."""


@dataclass(frozen=True)
class Measured:
    """One cell at one seed.

    Attributes:
        row: its row.
        label: what the row is called.
        seed: the seed.
        manifest: what its stage wrote.
    """

    row: str
    label: str
    seed: int
    manifest: dict[str, Any]

    def lines(self) -> list[tuple[str, RolloutCredit]]:
        """A line for each rollout, by iteration, with what it is called.

        Where a method has several, their numbers cannot be averaged: what one step's noise
        explains depends on which others are noisy.
        """
        rollouts = [RolloutCredit.of(one) for one in self.manifest["rollouts"]]
        rollouts.sort(key=lambda rollout: rollout.iteration)
        if len(rollouts) == 1:
            return [(self.label, rollouts[0])]
        windows = [steps_text([step.step for step in one.steps]) for one in rollouts]
        # Those of the same steps differ in something else.
        names = [
            window if windows.count(window) == 1 else f"{window}, iteration {one.iteration}"
            for one, window in zip(rollouts, windows, strict=True)
        ]
        labels = [f"{self.label}, {name}" for name in names]
        return list(zip(labels, rollouts, strict=True))


def steps_text(steps: Sequence[int]) -> str:
    """``step 5``, ``steps 2 to 5`` where they follow each other, else ``steps 0, 2, 5``."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    first, last = steps[0], steps[-1]
    whole = list(steps) == list(range(first, last + 1))
    return f"steps {first} to {last}" if whole else f"steps {', '.join(map(str, steps))}"


@dataclass(frozen=True)
class Quantity:
    """One number a step for every line, over seeds.

    Attributes:
        title: what it is.
        values: by the line's label and step.
    """

    title: str
    values: dict[str, dict[Step, Number]]

    @property
    def steps(self) -> list[Step]:
        """All steps of any line, ascending; the gradient over all steps last."""
        steps = {step for row in self.values.values() for step in row}
        return sorted(steps, key=lambda step: (isinstance(step, str), step))


def quantity(title: str, found: Iterable[tuple[str, dict[Step, float]]]) -> Quantity:
    """Means over the seeds of what was measured, with their intervals, by the line's label."""
    gathered: dict[str, dict[Step, list[float]]] = {}
    for label, by_step in found:
        for step, value in by_step.items():
            gathered.setdefault(label, {}).setdefault(step, []).append(value)
    values = {
        label: {step: _over_seeds(values) for step, values in by_step.items()}
        for label, by_step in gathered.items()
    }
    return Quantity(title, values)


def _over_seeds(values: Sequence[float]) -> Number:
    if len(values) < MIN_SEEDS:
        return Number(mean=float(np.mean(values)), count=len(values))
    return Number(**interval_fields(method_intervals([values])[0]))


def quantities_of(measured: Sequence[Measured], rewards: Sequence[str]) -> list[Quantity]:
    """The shares of each reward's variance, and the signal-to-noise ratios."""
    lines = [line for cell in measured for line in cell.lines()]
    explained = [
        quantity(
            f"{EXPLAINED} ({reward})",
            [(label, {s.step: s.explained[reward] for s in at.steps}) for label, at in lines],
        )
        for reward in rewards
    ]
    ratios: list[tuple[str, dict[Step, float]]] = [
        (label, {**{s.step: s.ratio for s in at.steps}, ALL_STEPS: at.ratio}) for label, at in lines
    ]
    return [*explained, quantity(RATIO, ratios)]


def publish_credit(
    experiment: Experiment,
    profile: Profile,
    cells: Sequence[ResolvedCell],
    gaps: Sequence[Gap],
    layout: Layout,
) -> None:
    """Writes what has been measured of ``cells`` and prints it; ``gaps`` are the others."""
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


def _print(title: str, quantities: Sequence[Quantity]) -> None:
    console = wide_console()
    for found in quantities:
        steps = [str(step) for step in found.steps]
        table = plain_table("method", *steps, right=steps)
        console.print(literal(f"{title}: {found.title}, by step", "italic"))
        for label, row in found.values.items():
            means = [f"{row[step].mean:.3f}" if step in row else "" for step in found.steps]
            table.add_row(label, *means)
        console.print(table)
        console.print()


# --- forms ---------------------------------------------------------------------------------------


def credit_markdown(
    experiment: Experiment, profile: str, quantities: Sequence[Quantity], gaps: Sequence[Gap]
) -> str:
    """A table for each quantity, and what the numbers are."""
    parts = [f"### {markdown_escape(experiment.table.title)} (profile `{profile}`)"]
    for found in quantities:
        heads = [("Method", "---"), *((str(step), "---:") for step in found.steps)]
        lines = [
            [markdown_escape(label), *(_shown(row.get(step)) for step in found.steps)]
            for label, row in found.values.items()
        ]
        parts += [f"**{found.title}**", markdown_table(heads, lines)]
    numbers = [n for found in quantities for row in found.values.values() for n in row.values()]
    fewest = min(number.count or 0 for number in numbers)
    over = (
        f"Mean over {fewest} seeds with a 95% t interval over them."
        if fewest >= MIN_SEEDS
        else f"{fewest} seed{'s' if fewest > 1 else ''}: too few for an interval."
    )
    settings = experiment.credit
    assert settings is not None
    how = (
        f"{settings.samples} pairs a prompt for each step; {settings.repeats} groups a prompt for "
        f"the gradients; at most {settings.rollouts} rollouts of a method."
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
    """One line for every stochastic step of every rollout."""
    steps = [
        (cell, rollout["iteration"], step)
        for cell in measured
        for rollout in cell.manifest["rollouts"]
        for step in rollout["steps"]
    ]
    rewards = sorted({name for _, _, step in steps for name in step["explained"]})
    heads = ["row", "seed", "iteration", "step", "sigma", *(f"explained_{n}" for n in rewards)]
    lines = [
        [
            cell.row,
            *map(str, (cell.seed, iteration, step["step"], step["sigma"])),
            *(str(step["explained"][name]) for name in rewards),
            *map(str, (step["signal"], step["noise"])),
        ]
        for cell, iteration, step in steps
    ]
    return csv_table([*heads, "signal", "noise"], lines)


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


def _figure(quantities: Sequence[Quantity], measured: Sequence[Measured], path: Path) -> None:
    """A panel for each quantity: its value at every step, bands over seeds."""
    rollouts = [rollout for cell in measured for _, rollout in cell.lines()]
    sigmas = {step.step: step.sigma for rollout in rollouts for step in rollout.steps}
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(4.4 * len(quantities), 3.6), layout="constrained")
        panels = figure.subplots(1, len(quantities), squeeze=False)[0]
        for axes, found in zip(panels, quantities, strict=True):
            draw_quantity(axes, found, sigmas)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)
        save_figure(figure, path)


def draw_quantity(axes: Axes, found: Quantity, sigmas: dict[int, float]) -> None:
    """A line for each label; bands where every step has an interval."""
    for index, (label, row) in enumerate(found.values.items()):
        steps = [step for step in sorted(sigmas) if step in row]
        numbers = [row[step] for step in steps]
        style = curve_style(index, markers=True)
        axes.plot(steps, [n.mean for n in numbers], label=label, markersize=4, **style)
        ends = [(n.low, n.high) for n in numbers if n.low is not None and n.high is not None]
        if len(ends) == len(steps):
            low, high = zip(*ends, strict=True)
            if len(steps) > 1:
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, lw=0)
            else:  # a band of one step has no width
                axes.vlines(steps, low, high, color=style["color"], alpha=0.5)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_title(found.title, wrap=True)
    axes.set_xticks(sorted(sigmas), [f"{k}\nσ {sigmas[k]:.2f}" for k in sorted(sigmas)])
    axes.set_xlabel("Stochastic step")
