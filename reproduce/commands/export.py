"""``g2rpo export``: trained weights in the format of diffusers."""

from pathlib import Path
from typing import Annotated

import typer

from g2rpo.errors import UserError


def export(
    run: Annotated[Path, typer.Argument(help="A run folder, as printed by `g2rpo train`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder that does not exist.")],
) -> None:
    """Export a run's weights as a diffusers pipeline folder, or as a LoRA file for it."""
    from g2rpo.training.checkpoint.load import export_trained

    if output.exists():
        raise UserError(f"{output}: already exists; choose another --output")
    typer.echo(f"{output}: {export_trained(run, output)}")
