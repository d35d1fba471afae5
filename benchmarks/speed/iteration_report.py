"""The timings of an iteration as Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.speed.report import markdown_table

PHASES = {
    "rollout": "rollouts", "decode": "decoding", "reward": "scoring", "training": "training step",
}  # fmt: skip


def rows(result: Mapping[str, Any], executions: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each quantity with a cell for each of the ``executions``."""
    original, batched = (execution["whole"] for execution in executions[:2])

    def about(each: Mapping[str, Any]) -> str:
        return "~" if each["run_evaluations"] < each["evaluations"] else ""

    def seconds(phase: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda e: f"{about(e)}{e['seconds'][phase]:.3g}"

    quantities: dict[str, Callable[[Mapping[str, Any]], str]] = {
        **{f"{text}, s": seconds(phase) for phase, text in PHASES.items()},
        "whole iteration, s": lambda e: f"{about(e)}{e['whole']:.3g}",
        "NFE": lambda e: f"{e['evaluations']:,}",
        "NFE run": lambda e: f"{e['run_evaluations']:,}",
        "ms per NFE": lambda e: f"{1000 * e['seconds']['rollout'] / e['evaluations']:.3g}",
        "TFLOP/s of rollouts": lambda e: f"{e['rollout_tflops']:.3g}",
        "share of the ceiling": lambda e: f"{e['rollout_tflops'] / result['ceiling_tflops']:.1%}",
        "training forwards": lambda e: f"{e['training_evaluations']}",
        "peak memory, GB": lambda e: "–" if e["peak_gb"] is None else f"{e['peak_gb']:.1f}",
        "largest reward difference": lambda e: f"{e['reward_difference']:.1e}",
        "speedup": lambda e: f"{original / e['whole']:.2f}×",
        "speedup over batched only": lambda e: f"{batched / e['whole']:.2f}×",
    }
    return [[text, *map(quantity, executions)] for text, quantity in quantities.items()]


def conditions(result: Mapping[str, Any]) -> str:
    """One paragraph: what was run, where, and what is extrapolated."""
    settings, provenance = result["settings"], result["provenance"]
    ratios = ", ".join(f"{ratio:.2f}" for ratio in result["ratios"])
    weights = (
        "FLUX.1-dev's shape and HPS at full size with random weights"
        if settings["size"] == "flux" else f"the models of size {settings['size']}"
    )  # fmt: skip
    part = ""
    if settings["every"] > 1:
        part = (
            f" The original ran one (step, sample) pair in {settings['every']}, the batched "
            f"original one step in {settings['every_batched']}; ~ marks extrapolated figures "
            "(rollouts by NFE, the rest by images)."
        )
    return (
        f"One prompt, T = {settings['steps']}, G = {settings['group_size']}, granularities "
        f"{settings['granularities']}, the first half of the steps stochastic, "
        f"{settings['resolution']} pixels, adapters of rank {settings['rank']}; {weights}. "
        f"Device: {provenance['hardware']['device']}, {settings['threads']} threads, torch "
        f"{provenance['packages']['torch']}, commit {provenance['git_commit']}. A matrix product "
        f"reached {result['ceiling_tflops']:.3g} TFLOP/s in the same run. Medians of "
        f"{settings['repeats']} alternating repeats; ratios of the repeats: {ratios}."
        f"{part} The original evaluates one latent at a time; batched only evaluates a group at "
        "once, without sharing. On a CPU both have diffusers' own blocks, and seconds are CPU "
        "time. On a GPU the original decodes in tiles and has float32 weights under bfloat16 "
        "autocast, so rewards differ."
    )


def report(result: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = [f"# One iteration of G²RPO, size {result['settings']['size']}", "", conditions(result)]
    for what, found in (("Adapters", result), ("All weights", result["all_weights"])):
        if found is not None:
            head = ["", *(each["name"] for each in found["executions"])]
            table = markdown_table(head, rows(result, found["executions"]), "---:")
            lines += ["", f"{what} trained:", "", table]
    return "\n".join([*lines, ""])
