"""``g2rpo list``, ``config`` and ``power``: what can be run, and what it can show."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from g2rpo.config import load_yaml, parse_overrides
from g2rpo.errors import UserError
from g2rpo.terminal import plain_table, wide_console
from g2rpo.text import visible
from reproduce.bundled import bundled_names, named_file
from reproduce.commands.options import (
    CellKey,
    ExperimentName,
    Overrides,
    ProfileName,
    parse_seeds,
)


def list_bundled() -> None:
    """List the bundled experiments, profiles, suites, protocols, methods and rewards."""
    from g2rpo.methods.base import method_names
    from g2rpo.methods.presets import method_summary, preset_names
    from g2rpo.rewards.registry import REWARDS

    table = plain_table("kind", "name", "description")
    for name in bundled_names("experiments"):
        shown = load_yaml(named_file("experiments", name))["table"]
        table.add_row("experiment", name, shown["title"])
    for folder in ("profiles", "suites", "protocols"):
        for name in bundled_names(folder):
            table.add_row(folder[:-1], name, load_yaml(named_file(folder, name))["description"])
    for name in preset_names():
        coded = name in method_names()
        summary = _summary(f"g2rpo.methods.{name}") if coded else method_summary(name)
        table.add_row("method", name, summary)
    for name, target in REWARDS.items():
        table.add_row("reward", name, _summary(target.partition(":")[0]))
    wide_console().print(table)


def _summary(module: str) -> str:
    """The first line of a module's docstring, without importing it: rewards load slowly."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def config(
    experiment: ExperimentName,
    cell: CellKey,
    profile: ProfileName = "mini",
    seed: Annotated[
        int | None, typer.Option("--seed", help="Training seed; default: the profile's first.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print every setting of a cell as YAML, with the layer it comes from.

    Later layers win: profile, preset, tuned rate, cell, -s, budget.
    """
    from reproduce.experiment import Resolver, explain, load_experiment, load_profile

    chosen = load_profile(profile)
    resolver = Resolver(load_experiment(experiment), chosen, parse_overrides(overrides or []))
    lines = explain(resolver, cell, chosen.seeds[0] if seed is None else seed)
    typer.echo("\n".join(visible(line) for line in lines))


def power(
    deviation: Annotated[
        float, typer.Argument(help="Standard deviation of the methods' difference over seeds.")
    ],
    seeds: Annotated[str, typer.Option(help="Numbers of seeds, e.g. 3,5,10.")] = "3,5,10,20",
    comparisons: Annotated[
        int, typer.Option(help="Number of comparisons that are corrected together.")
    ] = 1,
) -> None:
    """Print the smallest difference of two methods that a test finds with probability 0.8.

    The test is the paired t-test over shared seeds, at 0.05 after the correction. The difference
    has the unit of DEVIATION, which can be computed from the intervals in earlier tables.
    """
    from benchmarks.evaluation.power import POWER, detectable_difference

    table = plain_table("seeds", "difference", right=("seeds", "difference"))
    for count in parse_seeds(seeds):
        try:
            found = detectable_difference(deviation, count, comparisons=comparisons)
        except ValueError as error:
            raise UserError(f"{count} seeds: {error}") from None
        table.add_row(str(count), f"{found:.3g}")
    typer.echo(f"Smallest difference found with probability {POWER}:")
    wide_console().print(table)
