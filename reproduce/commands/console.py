"""What is shown in a terminal: plain tables, and the words for states.

Nothing here imports a model library: states are asked for on login nodes.
"""

from collections.abc import Sequence

from rich.text import Text

from g2rpo.terminal import PlainTable, literal, wide_console
from reproduce.runs.state import Word

__all__ = ["STYLES", "literal", "plain_table", "state_text", "wide_console"]

STYLES: dict[Word, str] = {
    "done": "green", "running": "cyan", "starting": "cyan", "waiting": "dim",
    "failed": "bold red", "cancelled": "red", "interrupted": "yellow",
    "unknown": "yellow",
}  # fmt: skip


def state_text(word: Word) -> Text:
    """The word for a state in its colour."""
    return Text(word, STYLES[word])


def plain_table(*columns: str, right: Sequence[str] = ()) -> PlainTable:
    """A table without lines; ``right`` names the columns of numbers."""
    table = PlainTable(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table
