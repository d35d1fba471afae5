"""``g2rpo config``: the settings of a cell and where each comes from."""

from typing import Annotated

import typer

from g2rpo.config import parse_overrides
from g2rpo.text import visible
from reproduce.commands.options import CellKey, ExperimentName, Overrides, ProfileName


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
