"""``g2rpo embed``: encode the prompts of an experiment, before it is run."""

from pathlib import Path
from typing import Annotated

import typer


def embed(
    experiment: Annotated[str, typer.Argument(help="As for `g2rpo reproduce`.")],
    profile: Annotated[
        str, typer.Option("--profile", help="smoke, mini, flux, or a YAML file.")
    ] = "mini",
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Training seed; repeatable; default: the profile's."),
    ] = None,
    results: Annotated[
        Path, typer.Option("--results", help="The embeddings go to runs/embeddings in it.")
    ] = Path("results"),
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Training setting, as for `g2rpo train`."),
    ] = None,
) -> None:
    """Encode the prompts of an experiment once, so that nothing else needs the text encoders.

    What is there is read and checked. Interrupted, the same command goes on.
    """
    from g2rpo.config import parse_overrides
    from reproduce import experiment as experiments
    from reproduce.commands.options import layout_of
    from reproduce.jobs.runner import build_assets
    from reproduce.stages import embedding

    chosen = experiments.load_profile(profile)
    loaded = experiments.load_experiment(experiment)
    build_assets(chosen)
    cells = experiments.expand(
        loaded, chosen, seed or chosen.seeds, parse_overrides(overrides or [])
    )
    layout = layout_of(results)
    for folder in embedding.embed(cells, layout):
        typer.echo(folder)
