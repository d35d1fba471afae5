"""A comparison of runs on the terminal."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.evaluation.statistics import ALPHA, NOTHING, fixed, human, p_text, signed
from g2rpo.terminal import literal, plain_table
from reproduce.experiment.table import CostColumn
from reproduce.report.comparison import (
    Delta,
    Difference,
    Member,
    Section,
    curve_deltas,
    provenance_differences,
    score_sections,
    setting_differences,
)
from reproduce.tables.model import COST_LABELS, METRIC_LABELS, NOT_SIGNIFICANT

DIGITS = 4
COSTS: tuple[CostColumn, ...] = (
    "iterations",
    "rollout_evaluations",
    "training_backwards",
    "images_scored",
    "equal_cost_evaluations",
    "device_seconds",
)
LONGEST = 60
"""Maximum characters of a setting."""


def print_comparison(compared: Sequence[Member], console: Console) -> None:
    """Prints how runs differ from the first: scores, curves, cost, settings, provenance."""
    console.print(Text("Runs", "bold"))
    for member in compared:
        note = " (reference)" if member is compared[0] else ""
        names = ", ".join(run.name for run in member.runs)
        console.print(literal(f"  {member.letter}{note}: {names}"))
    sections = score_sections(compared)
    for section in sections:
        title = f"Held-out: {section.protocol}, {section.prompts} prompts"
        _print_table(console, title, _delta_table(section.deltas))
        console.print(literal(_meaning(section), "dim"))
    if not sections:
        console.print()
        console.print(literal("No held-out evaluation shared with the reference yet."))
    points = curve_deltas(compared)
    if points:
        title = "Validation at the last iteration shared with the reference"
        _print_table(console, title, _delta_table(points))
    title = "Cost, mean over seeds (ratio to the reference)"
    _print_table(console, title, _cost_table(compared))
    _print_differences("Settings that differ", setting_differences(compared), compared, console)
    for sentence in _unknown_settings(compared):
        console.print(literal(sentence, "dim"))
    _print_differences("Provenance", provenance_differences(compared), compared, console)


def _print_table(console: Console, title: str, table: Table) -> None:
    # rich wraps a table's own title to the width of the table.
    console.print()
    console.print(literal(title, "bold"))
    console.print(table)


def _delta_table(deltas: Sequence[Delta]) -> Table:
    curves = deltas[0].iteration is not None
    figures = ("iteration",) * curves + ("mean", "difference", "95% interval", "p (Holm)")
    table = plain_table("score", "run", *figures, "", "about", right=figures)
    last = ""
    for delta in deltas:
        quantity = METRIC_LABELS.get(delta.quantity, delta.quantity)
        table.add_row(
            "" if quantity == last else quantity,
            delta.member,
            *([str(delta.iteration)] if curves else []),
            fixed(delta.value, DIGITS),
            *_difference_texts(delta),
            _about(delta),
        )
        last = quantity
    return table


def _about(delta: Delta) -> str:
    if delta.difference is None:
        return ""
    seeds = f"seed{'s' if len(delta.seeds) > 1 else ''} {', '.join(map(str, delta.seeds))}"
    label = f"{delta.comparison.about}, " if delta.comparison is not None else ""
    return label + (seeds if delta.seeds else "own seeds")


def _difference_texts(delta: Delta) -> tuple[str | Text, ...]:
    """Difference, interval, p-value and verdict."""
    comparison = delta.comparison
    if comparison is None or delta.adjusted is None:
        shown = "" if delta.difference is None else signed(delta.difference, DIGITS)
        return (shown, "", "", "")
    verdict = Text(NOT_SIGNIFICANT)
    if delta.adjusted < ALPHA:
        verdict = Text("higher", "green") if comparison.difference > 0 else Text("lower", "red")
    return (
        signed(comparison.difference, DIGITS),
        f"{signed(comparison.low, DIGITS)} to {signed(comparison.high, DIGITS)}",
        p_text(delta.adjusted),
        verdict,
    )


def _meaning(section: Section) -> str:
    labels = {one.comparison.about for one in section.deltas if one.comparison is not None}
    sentences = []
    if "method" in labels:
        sentences.append("method: seed-level, paired t-test over shared seeds.")
    if "checkpoint" in labels:
        sentences.append("checkpoint: prompt-level, for these weights only, not other seeds.")
    if any(one.seeds for one in section.deltas):
        sentences.append("Differences are over the seeds listed, means over all seeds.")
    if section.missing:
        sentences.append(f"Not evaluated under this protocol: {', '.join(section.missing)}.")
    return " ".join(sentences)


def _cost_table(compared: Sequence[Member]) -> Table:
    columns = ("cost of training", *(member.letter for member in compared))
    table = plain_table(*columns, right=columns[1:])
    costs = [[run.cost for run in member.runs] for member in compared]
    devices = [sorted({cost.device for cost in found if cost is not None}) for found in costs]
    for column in COSTS:
        means = [
            None if None in found else float(np.mean([getattr(cost, column) for cost in found]))
            for found in costs
        ]
        texts = []
        for index, (mean, device) in enumerate(zip(means, devices, strict=True)):
            text = human(mean)
            # Seconds on different devices are not comparable.
            comparable = column != "device_seconds" or device == devices[0]
            if index and mean is not None and means[0] and comparable:
                text += f" ({mean / means[0]:.2f}×)"
            texts.append(text)
        table.add_row(COST_LABELS[column], *texts)
    table.add_row("Device", *(", ".join(names) or NOTHING for names in devices))
    return table


def _unknown_settings(compared: Sequence[Member]) -> list[str]:
    unknown = [one for one in compared if one.runs[0].settings is None]
    sentences = []
    if unknown:
        letters = ", ".join(one.letter for one in unknown)
        sentences.append(
            f"Settings of {letters}: unknown (the base, weights trained elsewhere, or an "
            "experiment that has changed since)."
        )
    together = [one.letter for one in unknown if len(one.runs) > 1]
    if together:
        sentences.append(
            f"The runs of {', '.join(together)} are grouped as cells of one row, folder and "
            "commit; they may differ in more than their seed."
        )
    return sentences


def _print_differences(
    title: str, differences: Sequence[Difference], compared: Sequence[Member], console: Console
) -> None:
    if not differences:
        console.print()
        console.print(Text.assemble((title, "bold"), ": no difference"))
        return
    table = plain_table("key", *(member.letter for member in compared))
    for one in differences:
        style = "" if one.determining else "dim"
        note = "" if one.determining else " (does not change the weights)"
        table.add_row(one.key + note, *map(_shortened, one.values), style=style)
    _print_table(console, title, table)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
