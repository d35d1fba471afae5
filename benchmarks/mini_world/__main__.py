"""``python -m benchmarks.mini_world``: builds the mini world's assets from a seed."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.mini_world.build import MiniWorldSettings, build
from g2rpo.errors import UserError


def main(
    assets: Annotated[Path, typer.Option(help="Folder of the assets.")] = Path(__file__).parent
    / "assets",
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Parts built at a time, a core each.")] = 2,
    rebuild: Annotated[
        list[str] | None, typer.Option(help="A part to build again; may be given several times.")
    ] = None,
) -> None:
    """Builds what is missing: prompts, autoencoder, attribute judge, base policy, judges."""
    try:
        manifest = build(
            MiniWorldSettings(seed=seed), assets, frozenset(rebuild or ()), typer.echo, jobs
        )
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    total = sum(part["seconds"] for part in manifest["parts"].values())
    typer.echo(
        f"{assets}: {len(manifest['files'])} files, {manifest['bytes'] / 1e6:.1f} MB, "
        f"parts built in {total / 60:.0f} min, one after the other"
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    typer.run(main)
