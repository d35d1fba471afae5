"""``g2rpo embed``: encode the prompts of an experiment ahead of time."""

from pathlib import Path
from typing import Annotated

import typer

from g2rpo.config import parse_overrides
from reproduce.commands.options import ExperimentName, Overrides, ProfileName, Results, layout_of


def embed(
    experiment: ExperimentName,
    profile: ProfileName = "mini",
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Training seed; repeatable; default: the profile's."),
    ] = None,
    results: Results = Path("results"),
    overrides: Overrides = None,
) -> None:
    """Encode the prompts of an experiment, so that no other stage needs the text encoders.

    Embeddings are cached in RESULTS/runs/embeddings. If interrupted, run the same command to
    resume.
    """
    from reproduce import experiment as experiments
    from reproduce.jobs.runner import build_assets
    from reproduce.stages import embedding

    chosen = experiments.load_profile(profile)
    loaded = experiments.load_experiment(experiment)
    build_assets(chosen)
    settings = parse_overrides(overrides or [])
    cells = experiments.expand(loaded, chosen, seed or chosen.seeds, settings)
    for folder in embedding.embed(cells, layout_of(results)):
        typer.echo(folder)
