"""The timing of an iteration as a table on the terminal and a page of Markdown."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

PHASES = {
    "rollout": "rollouts", "decode": "decoding", "reward": "scoring", "training": "training step",
}  # fmt: skip
GOALS = {"cpu": 4.0, "cuda": 3.0}
FP8_GOAL = 4.0
CEILING_GOAL, REST_GOAL = 0.75, 0.15
"""On a GPU: the rollout's share of the ceiling, and the largest share of all else."""


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A line for each quantity, with a cell for each execution."""
    found = result["executions"]
    original = found[0]["whole"]

    def about(each: Mapping[str, Any]) -> str:
        return "~" if each["run_evaluations"] < each["evaluations"] else ""

    lines = [
        [f"{text}, s", *(f"{about(e)}{e['seconds'][phase]:.3g}" for e in found)]
        for phase, text in PHASES.items()
    ]
    return [
        *lines,
        ["whole iteration, s", *(f"{about(e)}{e['whole']:.3g}" for e in found)],
        ["velocity evaluations", *(f"{e['evaluations']:,}" for e in found)],
        ["of them run", *(f"{e['run_evaluations']:,}" for e in found)],
        ["ms an evaluation", *(f"{_milliseconds(e):.3g}" for e in found)],
        ["TFLOP/s in rollouts", *(f"{e['rollout_tflops']:.3g}" for e in found)],
        ["of the ceiling", *(f"{_share(e, result):.1%}" for e in found)],
        ["training forwards", *(f"{e['training_evaluations']}" for e in found)],
        ["peak memory, GB", *(_peak(e) for e in found)],
        ["largest difference of a reward", *(f"{e['reward_difference']:.1e}" for e in found)],
        ["faster by", *(f"{original / e['whole']:.2f}×" for e in found)],
    ]  # fmt: skip


def _peak(execution: Mapping[str, Any]) -> str:
    return "–" if execution["peak_gb"] is None else f"{execution['peak_gb']:.1f}"


def _milliseconds(execution: Mapping[str, Any]) -> float:
    return 1000 * float(execution["seconds"]["rollout"]) / int(execution["evaluations"])


def _share(execution: Mapping[str, Any], result: Mapping[str, Any]) -> float:
    return float(execution["rollout_tflops"]) / float(result["ceiling_tflops"])


def goals(result: Mapping[str, Any]) -> list[str]:
    """Each goal of the engine, and whether this run met it."""
    device = result["settings"]["device"]
    ours = result["executions"][2]
    found = [_goal("whole iteration, exact", result["ratio"], GOALS[device], "×")]
    if device == "cuda":
        rest = 1 - ours["seconds"]["rollout"] / ours["whole"]
        found.append(_goal("rollouts, of the ceiling", _share(ours, result), CEILING_GOAL, ""))
        met = "met" if rest <= REST_GOAL else "NOT MET"
        found.append(f"all but rollouts: {rest:.0%} of the iteration, goal at most 15 %: {met}")
        for each in result["executions"][3:]:
            ratio = result["executions"][0]["whole"] / each["whole"]
            found.append(_goal(each["name"], ratio, FP8_GOAL, "×"))
    return found


def _goal(what: str, value: float, goal: float, unit: str) -> str:
    met = "met" if value >= goal else "NOT MET"
    return f"{what}: {value:.2f}{unit}, goal at least {goal:g}{unit}: {met}"


def conditions(result: Mapping[str, Any]) -> str:
    """One paragraph: what was run, where, and what is extrapolated."""
    settings, provenance = result["settings"], result["provenance"]
    ratios = ", ".join(f"{ratio:.2f}" for ratio in result["ratios"])
    weights = (
        "FLUX.1-dev's shape and a judge of HPS's with random weights"
        if settings["size"] == "flux" else f"the models of size {settings['size']}"
    )  # fmt: skip
    part = ""
    if settings["every"] > 1:
        part = (
            f" Of the original one (step, sample) pair in {settings['every']} was run, of the "
            f"batched one a step in {settings['every_batched']}; ~ marks what is extrapolated "
            "from them, rollouts by evaluations and the rest by images."
        )
    return (
        f"One prompt, T = {settings['steps']}, G = {settings['group_size']}, granularities "
        f"{settings['granularities']}, the first half of the steps stochastic, "
        f"{settings['resolution']} pixels, adapters of rank {settings['rank']}; {weights}. "
        f"Device: {provenance['hardware']['device']}, {settings['threads']} threads, torch "
        f"{provenance['packages']['torch']}, commit {provenance['git_commit']}. A matrix product "
        f"reached {result['ceiling_tflops']:.3g} TFLOP/s in the same run. All executions in turn, "
        f"{settings['repeats']} times, the median of each shown; ratios of the repeats: {ratios}."
        f"{part} On a GPU the original decodes in tiles, which gives other pixels, and its "
        "weights are float32 under bfloat16 autocast, so that rewards differ there."
    )


def report(result: Mapping[str, Any]) -> str:
    """The page."""
    names = [each["name"] for each in result["executions"]]
    table = [
        "| | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
        *("| " + " | ".join(row) + " |" for row in rows(result)),
    ]
    return "\n".join(
        [
            f"# One iteration of G²RPO, size {result['settings']['size']}",
            *("", conditions(result), ""),
            *table,
            "",
            *(f"- {goal}" for goal in goals(result)),
            "",
        ]
    )


def show(result: Mapping[str, Any]) -> None:
    """The table and its conditions on the terminal."""
    console = Console()
    table = Table(title=f"One iteration of G2RPO, size {result['settings']['size']}")
    table.add_column("")
    for each in result["executions"]:
        table.add_column(each["name"], justify="right")
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    for line in (conditions(result), *goals(result)):
        console.print(line, highlight=False)
