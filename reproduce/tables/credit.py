"""What an experiment on credit leaves for people: tables by step, a figure, the numbers."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evaluation.credit import RolloutCredit
from benchmarks.evaluation.statistics import MIN_SEEDS, Interval, method_intervals
from g2rpo.files import atomic_path, atomic_write_text, write_json
from g2rpo.terminal import literal, plain_table, wide_console
from reproduce.experiment import Experiment, Profile, ResolvedCell
from reproduce.experiment.layout import Layout
from reproduce.runs.folders import read_manifest
from reproduce.tables.figures import FIGURE_STYLE, LINE_STYLES, MARKERS, PALETTE
from reproduce.tables.markdown import markdown_escape
from reproduce.tables.notes import Gap

EXPLAINED = "Share of the reward's variance that the step's noise explains"
RATIO = "Signal-to-noise ratio of the step's gradient, one iteration"
ALL_STEPS = "all"
"""In the place of a step: the gradient over all trained steps."""
EXPLANATIONS = (
    (
        "Measured on the untrained policy, for every method's own rollout on the same prompts; "
        "docs/credit.md has the definitions."
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

    def steps(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every stochastic step of every rollout with the rollout's iteration."""
        for rollout in self.manifest["rollouts"]:
            for step in rollout["steps"]:
                yield rollout["iteration"], step

    def lines(self) -> Iterator[tuple[str, RolloutCredit]]:
        """A line for each rollout, by iteration, with what it is called.

        Where a method has several, their numbers cannot be averaged: what one step's noise
        explains depends on which others are noisy.
        """
        rollouts = [RolloutCredit.of(one) for one in self.manifest["rollouts"]]
        rollouts.sort(key=lambda rollout: rollout.iteration)
        if len(rollouts) == 1:
            yield self.label, rollouts[0]
            return
        windows = [steps_text([step.step for step in one.steps]) for one in rollouts]
        for rollout, window in zip(rollouts, windows, strict=True):
            alike = windows.count(window) > 1  # they differ in something else
            which = f", iteration {rollout.iteration}" if alike else ""
            yield f"{self.label}, {window}{which}", rollout


def explained(rollout: RolloutCredit, reward: str) -> dict[int | str, float]:
    """For each step, the share of the reward's variance."""
    return {step.step: step.explained[reward] for step in rollout.steps}


def ratios(rollout: RolloutCredit) -> dict[int | str, float]:
    """For each step, and for all together, the signal-to-noise ratio."""
    return {**{step.step: step.ratio for step in rollout.steps}, ALL_STEPS: rollout.ratio}


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
        values: by the line's label and step, the seeds' values.
    """

    title: str
    values: dict[str, dict[int | str, list[float]]]

    @classmethod
    def of(cls, title: str, found: Iterable[tuple[str, dict[int | str, float]]]) -> "Quantity":
        """Gathers what was measured, by the line's label."""
        values: dict[str, dict[int | str, list[float]]] = {}
        for label, by_step in found:
            for step, value in by_step.items():
                values.setdefault(label, {}).setdefault(step, []).append(value)
        return cls(title, values)

    @property
    def steps(self) -> list[int | str]:
        """All steps of any line, ascending; the gradient over all steps last."""
        steps = {step for row in self.values.values() for step in row}
        return sorted(steps, key=lambda step: (isinstance(step, str), step))


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
    rewards = [column.reward for column in spec.columns]
    measured: list[Measured] = []
    for cell in sorted(cells, key=lambda cell: (list(labels).index(cell.key), cell.seed or 0)):
        manifest = read_manifest(layout.credit(cell))
        assert manifest is not None
        measured.append(Measured(cell.key, labels[cell.key], cell.seed or 0, manifest))
    if not measured:
        return
    lines = [line for cell in measured for line in cell.lines()]
    quantities = [
        *(
            Quantity.of(
                f"{EXPLAINED} ({reward})", [(of, explained(at, reward)) for of, at in lines]
            )
            for reward in rewards
        ),
        Quantity.of(RATIO, [(of, ratios(at)) for of, at in lines]),
    ]
    output = layout.experiment(profile.name, experiment.name)
    output.mkdir(parents=True, exist_ok=True)
    text = _markdown(experiment, profile, quantities, gaps)
    atomic_write_text(output / "credit.md", text)
    atomic_write_text(output / "credit.csv", _csv(measured))
    write_json(output / "credit.json", _document(experiment, profile, measured))
    sigmas = {step["step"]: step["sigma"] for m in measured for _, step in m.steps()}
    for suffix in (".png", ".pdf"):
        _figure(quantities, sigmas, (output / "credit").with_suffix(suffix))
    _print(experiment.table.title, quantities)
    for path in sorted(output.glob("credit.*")):
        typer.echo(f"wrote {path}")


def _print(title: str, quantities: Sequence[Quantity]) -> None:
    console = wide_console()
    for quantity in quantities:
        steps = [str(step) for step in quantity.steps]
        table = plain_table("method", *steps, right=steps)
        console.print(literal(f"{title}: {quantity.title}, by step", "italic"))
        for label, row in quantity.values.items():
            means = [f"{np.mean(row[step]):.3f}" if step in row else "" for step in quantity.steps]
            table.add_row(label, *means)
        console.print(table)
        console.print()


# --- forms ---------------------------------------------------------------------------------------


def _markdown(
    experiment: Experiment,
    profile: Profile,
    quantities: Sequence[Quantity],
    gaps: Sequence[Gap],
) -> str:
    parts = [f"### {markdown_escape(experiment.table.title)} (profile `{profile.name}`)"]
    for quantity in quantities:
        parts.append(f"**{quantity.title}**")
        steps = quantity.steps
        lines = [f"| Method | {' | '.join(map(str, steps))} |", "|---|" + "---:|" * len(steps)]
        for label, row in quantity.values.items():
            shown = [_shown(row[step]) if step in row else "" for step in steps]
            lines.append(f"| {markdown_escape(label)} | {' | '.join(shown)} |")
        parts.append("\n".join(lines))
    counts = {len(v) for q in quantities for row in q.values.values() for v in row.values()}
    fewest = min(counts)
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
    notes = [*EXPLANATIONS, over, how]
    notes += [f"Missing: {gap.row}, seed {gap.seed}: {gap.reason}" for gap in gaps]
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _interval(values: Sequence[float]) -> Interval | None:
    return method_intervals([list(values)])[0] if len(values) >= MIN_SEEDS else None


def _shown(values: Sequence[float]) -> str:
    interval = _interval(values)
    mean = f"{float(np.mean(values)):.3f}"
    if interval is None:
        return mean
    return f"{mean}<br><sub>[{interval.low:.3f}, {interval.high:.3f}]</sub>"


def _csv(measured: Sequence[Measured]) -> str:
    out = io.StringIO()
    steps = [step for cell in measured for _, step in cell.steps()]
    rewards = sorted({name for step in steps for name in step["explained"]})
    writer = csv.writer(out, lineterminator="\n")
    head = ["row", "seed", "iteration", "step", "sigma"]
    writer.writerow([*head, *(f"explained_{name}" for name in rewards), "signal", "noise"])
    for cell in measured:
        for iteration, step in cell.steps():
            shares = [step["explained"][name] for name in rewards]
            place = [cell.row, cell.seed, iteration, step["step"], step["sigma"]]
            writer.writerow([*place, *shares, step["signal"], step["noise"]])
    return out.getvalue()


def _document(
    experiment: Experiment, profile: Profile, measured: Sequence[Measured]
) -> dict[str, Any]:
    assert experiment.credit is not None
    return {
        "experiment": experiment.name,
        "profile": profile.name,
        "settings": experiment.credit.model_dump(mode="json"),
        "cells": [
            {
                "row": cell.row,
                "seed": cell.seed,
                "inputs": cell.manifest["inputs"],
                "provenance": cell.manifest["provenance"],
                "rollouts": cell.manifest["rollouts"],
            }
            for cell in measured
        ],
    }


def _figure(quantities: Sequence[Quantity], sigmas: dict[int, float], path: Path) -> None:
    """A panel for each quantity: its value at every step, bands over seeds."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(4.4 * len(quantities), 3.6), layout="constrained")
        panels: npt.NDArray[Any] = figure.subplots(1, len(quantities), squeeze=False)[0]
        for axes, quantity in zip(panels, quantities, strict=True):
            _panel(axes, quantity, sigmas)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)
        with atomic_path(path) as temporary:
            metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
            figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)


def _panel(axes: Axes, quantity: Quantity, sigmas: dict[int, float]) -> None:
    for index, (label, row) in enumerate(quantity.values.items()):
        steps = [step for step in sorted(sigmas) if step in row]
        means = [float(np.mean(row[step])) for step in steps]
        color = PALETTE[index % len(PALETTE)]
        # Beyond the palette, a colour that comes again has another line and marker.
        style = (index + index // len(PALETTE)) % len(MARKERS)
        axes.plot(
            steps, means, color=color, label=label, markersize=4,
            linestyle=LINE_STYLES[style], marker=MARKERS[style],
        )  # fmt: skip
        bands = [_interval(row[step]) for step in steps]
        if all(band is not None for band in bands):
            ends = np.array([(band.low, band.high) for band in bands if band is not None])
            if len(steps) > 1:
                axes.fill_between(steps, ends[:, 0], ends[:, 1], color=color, alpha=0.15, lw=0)
            else:  # a band of one step has no width
                axes.vlines(steps, ends[:, 0], ends[:, 1], color=color, alpha=0.5)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_title(quantity.title, wrap=True)
    axes.set_xticks(sorted(sigmas), [f"{k}\nσ {sigmas[k]:.2f}" for k in sorted(sigmas)])
    axes.set_xlabel("Stochastic step")
