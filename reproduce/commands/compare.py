"""``g2rpo runs`` and ``g2rpo compare``: what is there, and how it differs."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from g2rpo.errors import UserError
from reproduce.commands.options import Results


def runs(
    words: Annotated[
        list[str] | None, typer.Argument(help="Only runs whose names hold all of these.")
    ] = None,
    state: Annotated[
        str | None, typer.Option("--state", help="Only runs in this state, e.g. running.")
    ] = None,
    results: Results = Path("results"),
) -> None:
    """List the runs with state, progress, ETA and last reward, the latest to change first.

    It reads what is on disk, so it works from any shell and asks no process.
    """
    from g2rpo.terminal import wide_console
    from reproduce.runs.listing import read_run_states, states_table
    from reproduce.runs.state import STYLES

    if state is not None and state not in STYLES:
        raise UserError(f"no state {state!r}; states are {', '.join(STYLES)}")
    known = read_run_states(results / "runs")
    if not known:
        raise UserError(f"{results / 'runs'}: no runs yet; --results names another folder")
    shown = [
        one
        for one in known
        if all(word in one.name for word in words or ()) and state in (None, one.word)
    ]
    if not shown:
        raise UserError(_none_of([one.name for one in known], words or (), state))
    wide_console().print(states_table(shown, known))


def _none_of(names: Sequence[str], words: Sequence[str], state: str | None) -> str:
    """Why no run is shown, with what is near to a word that no name holds."""
    parts = sorted({part for name in names for part in name.split("-")})
    for word in words:
        if not any(word in name for name in names):
            close = get_close_matches(word, parts, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            return f"none of the {len(names)} runs has {word!r} in its name{hint}"
    asked = "".join(f" with {word!r}" for word in words)
    return f"none of the {len(names)} runs{asked}" + (f" is {state}" if state else " is there")


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...",
            help="Folders, or beginnings of names that fit one run; the first is the reference.",
        ),
    ],
    results: Results = Path("results"),
) -> None:
    """Compare runs with the first: scores with intervals, curves, cost, settings, provenance.

    Runs that differ in nothing but their seed are taken together. Committed results, of which no
    run folder is left, are found by the names of their runs.
    """
    from g2rpo.terminal import wide_console
    from reproduce.report.comparison import members
    from reproduce.report.comparison_tables import print_comparison
    from reproduce.runs.finished import find_runs

    print_comparison(members(find_runs(names, results)), wide_console())
