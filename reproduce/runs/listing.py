"""The list of runs as a table for the terminal."""

import time
from collections.abc import Mapping, Sequence

from rich.table import Table

from g2rpo.progress import duration
from reproduce.commands.console import plain_table, state_text
from reproduce.runs.states import RunState
from reproduce.settings import distinctions

DIGITS = 4


def states_table(states: Sequence[RunState], known: Sequence[RunState]) -> Table:
    """A row for each of ``states``, which are told apart from all the ``known`` of their method."""
    differs = distinctions({state.name: state.settings for state in known})
    columns = (
        "run", "state", "progress", "ETA", "last reward", "validation", "evaluations",
        "changed", "settings", "",
    )  # fmt: skip
    table = plain_table(*columns, right=("progress", "ETA", "changed"))
    for state in states:
        progress = "" if state.done is None else f"{state.done}/{state.total or '?'}"
        where = f"on {state.node}" if state.word == "running" and state.node else ""
        table.add_row(
            state.name,
            state_text(state.word),
            progress,
            "" if state.remaining is None else duration(state.remaining),
            _values(state.rewards),
            _values(state.validation),
            state.evaluations,
            _ago(state.updated),
            differs[state.name],
            state.reason or where,
        )
    return table


def _values(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.{DIGITS}f}" for name, value in values.items())


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
