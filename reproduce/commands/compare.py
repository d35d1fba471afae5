"""``g2rpo compare``: how runs differ."""

from pathlib import Path
from typing import Annotated

import typer

from reproduce.commands.options import Results


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...",
            help="Run folders or unique prefixes of run names; the first is the reference.",
        ),
    ],
    results: Results = Path("results"),
) -> None:
    """Compare runs with the first: scores with intervals, curves, cost, settings, provenance.

    Runs that differ only in their seed are grouped. Committed results without a run folder are
    found by the names of their runs.
    """
    from g2rpo.terminal import wide_console
    from reproduce.report.comparison import members
    from reproduce.report.comparison_tables import print_comparison
    from reproduce.runs.finished import find_runs

    print_comparison(members(find_runs(names, results)), wide_console())
