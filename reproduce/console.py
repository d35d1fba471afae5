"""What is shown in a terminal: consoles, plain tables, and the words for states.

Nothing here imports a model library: states are asked for on login nodes.
"""

from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table

Word = Literal[
    "done", "running", "starting", "waiting", "failed", "cancelled", "interrupted", "unknown"
]
STYLES: dict[Word, str] = {
    "done": "green", "running": "cyan", "starting": "cyan", "waiting": "dim",
    "failed": "bold red", "cancelled": "red", "interrupted": "yellow",
    "unknown": "yellow",
}  # fmt: skip


def wide_console(*, stderr: bool = False) -> Console:
    """A console that cuts nothing where it is not a terminal."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=10_000)


def plain_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table without lines; ``right`` names the columns of numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table
