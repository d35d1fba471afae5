"""``python -m benchmarks.mini_world``: builds the mini world's assets from a seed."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command import run
from benchmarks.mini_world.build import MiniWorldSettings, build

ASSETS = Path(__file__).parent / "assets"


def main(
    assets: Annotated[Path, typer.Option(help="Folder to write the assets to.")] = ASSETS,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 1,
    rebuild: Annotated[list[str] | None, typer.Option(help="Part to rebuild; repeatable.")] = None,
) -> None:
    """Build the missing parts: prompts, autoencoder, base policy, reward models, truth."""
    manifest = build(MiniWorldSettings(seed=seed), assets, frozenset(rebuild or ()), typer.echo)
    minutes = manifest["last_build"]["seconds"] / 60
    typer.echo(
        f"{assets}: {len(manifest['files'])} files, {manifest['bytes'] / 1e6:.1f} MB; "
        f"the last build took {minutes:.0f} min"
    )


if __name__ == "__main__":
    run(main)
