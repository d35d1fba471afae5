"""``g2rpo runs``: the runs of a results folder and their state."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from g2rpo.errors import UserError
from g2rpo.terminal import wide_console
from reproduce.commands.options import Results
from reproduce.runs.listing import read_run_states, states_table
from reproduce.runs.state import STYLES


def runs(
    words: Annotated[
        list[str] | None, typer.Argument(help="Only runs whose names contain all of these.")
    ] = None,
    state: Annotated[
        str | None, typer.Option("--state", help="Only runs in this state, e.g. running.")
    ] = None,
    results: Results = Path("results"),
) -> None:
    """List runs with state, progress, ETA and last reward, most recent first.

    Reads files only, so it works from any shell.
    """
    if state is not None and state not in STYLES:
        raise UserError(f"unknown state {state!r}; valid: {', '.join(STYLES)}")
    known = read_run_states(results / "runs")
    if not known:
        raise UserError(f"{results / 'runs'}: no runs yet; use --results for another folder")
    shown = [
        one
        for one in known
        if all(word in one.name for word in words or ()) and state in (None, one.word)
    ]
    if not shown:
        raise UserError(_none_of([one.name for one in known], words or (), state))
    wide_console().print(states_table(shown, known))


def _none_of(names: Sequence[str], words: Sequence[str], state: str | None) -> str:
    """Why no run matches, with the closest match to a word that no name contains."""
    parts = sorted({part for name in names for part in name.split("-")})
    for word in words:
        if not any(word in name for name in names):
            close = get_close_matches(word, parts, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            return f"none of the {len(names)} runs has {word!r} in its name{hint}"
    wanted = [*map(repr, words), *([f"state {state}"] if state else [])]
    return f"none of the {len(names)} runs matches {' and '.join(wanted)}"
