"""``g2rpo embed``: encode the prompts of an experiment, before it is run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.errors import UserError

if TYPE_CHECKING:
    from g2rpo.data.embeddings import Part


def embed(
    experiment: Annotated[str, typer.Argument(help="As for `g2rpo reproduce`.")],
    profile: Annotated[
        str, typer.Option("--profile", help="smoke, mini, flux, or a YAML file.")
    ] = "mini",
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Training seed; repeatable; default: the profile's."),
    ] = None,
    shard: Annotated[
        str, typer.Option("--shard", help="I/N encodes one of N disjoint parts, counted from 1.")
    ] = "1/1",
    results: Annotated[
        Path, typer.Option("--results", help="The embeddings go to runs/embeddings in it.")
    ] = Path("results"),
    every_prompt: Annotated[
        bool,
        typer.Option("--every-prompt", help="Also training prompts that no iteration will draw."),
    ] = False,
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

    part = parse_part(shard)
    chosen = experiments.load_profile(profile)
    loaded = experiments.load_experiment(experiment)
    build_assets(chosen)
    cells = experiments.expand(
        loaded, chosen, seed or chosen.seeds, parse_overrides(overrides or [])
    )
    layout = layout_of(results)
    for folder in embedding.embed(cells, layout, part, every_prompt=every_prompt):
        typer.echo(folder)


def parse_part(text: str) -> "Part":
    """The part that ``I/N`` means, I counted from 1."""
    from g2rpo.data.embeddings import Part

    index, _, count = text.partition("/")
    try:
        return Part(int(index) - 1, int(count))
    except ValueError:
        raise UserError(f"--shard {text!r}: expected I/N with I from 1 to N, e.g. 1/4") from None
