"""``g2rpo export``: what a run has trained, as diffusers has it."""

from pathlib import Path
from typing import Annotated

import typer

from g2rpo.errors import UserError


def export(
    run: Annotated[Path, typer.Argument(help="A run folder, as `g2rpo train` prints it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder that is not there yet.")],
) -> None:
    """Write a run's weights as a FluxPipeline folder, or as a LoRA file that FluxPipeline loads."""
    from g2rpo.training.checkpoint.load import export_trained

    if output.exists():
        raise UserError(f"{output}: is there already; export to another folder")
    typer.echo(f"{output}: {export_trained(run, output)}")
