"""How a benchmark is run as ``python -m``."""

import os
from collections.abc import Callable
from typing import Any

import typer

from g2rpo.errors import UserError
from g2rpo.quiet import quiet_libraries


def run(main: Callable[..., Any]) -> None:
    """Runs ``main`` with the command line's arguments, offline; a user's mistake is one line."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet_libraries()
    try:
        typer.run(main)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
