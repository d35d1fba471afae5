"""``g2rpo agreement``: whether methods keep their order under another profile."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.errors import UserError
from reproduce.commands.options import (
    ExperimentName,
    PublishedCells,
    Results,
    layout_of,
    parse_seeds,
)
from reproduce.commands.results import refuse_credit

if TYPE_CHECKING:
    from g2rpo.terminal import PlainTable
    from reproduce.tables.agreement import Agreement


def agreement(
    experiment: ExperimentName,
    profiles: Annotated[
        str,
        typer.Option(help="Profiles with finished cells; the first is compared with each other."),
    ],
    seeds: Annotated[
        str | None, typer.Option(help="Training seeds to compare, e.g. 1,2,3; default: all.")
    ] = None,
    results: Results = Path("results"),
    publish: PublishedCells = False,
) -> None:
    """Compare the order of an experiment's methods under several profiles.

    Prints Kendall's rank correlation with its interval over seeds, and how many pairs of methods
    have the same order, in-domain and out-of-domain.
    """
    from benchmarks.evaluation.results import cells_folder, load_cells
    from g2rpo.terminal import wide_console
    from reproduce import experiment as experiments
    from reproduce.tables.agreement import agreements

    names = [name.strip() for name in profiles.split(",")]
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"--profiles {profiles!r}: give two or more, each once, e.g. mini,mini-2")
    chosen = None if seeds is None else parse_seeds(seeds)
    loaded = experiments.load_experiment(experiment)
    refuse_credit(loaded, f"g2rpo reproduce {experiment}")
    layout = layout_of(results, publish=publish)
    found = []
    for name in names:
        profile = experiments.load_profile(name)
        folder = cells_folder(layout.tables, profile.name, loaded.name)
        cells = load_cells(folder)
        if not cells:
            command = f"g2rpo reproduce {experiment} --profile {name}"
            raise UserError(f"{folder}: no finished cells; run `{command}`, or add --publish")
        found.append((profile, cells))
    console = wide_console()
    for other in found[1:]:
        for one in agreements(loaded, found[0], other, chosen):
            console.print(_table(one))
            console.print(_sentences(one), markup=False, highlight=False)


def _table(one: "Agreement") -> "PlainTable":
    from g2rpo.terminal import plain_table

    table = plain_table("Method", *one.means, right=tuple(one.means))
    where = f", trained on {one.group}" if one.group else ""
    table.title = f"{one.measure.replace('_', '-')}{where}"
    for label, *values in zip(one.labels, *one.means.values(), strict=True):
        table.add_row(label, *(f"{value:.3f}" for value in values))
    return table


def _sentences(one: "Agreement") -> str:
    first, second = one.means
    text = (
        f"{one.same} of {one.pairs} pairs have the same order: Kendall's tau {one.tau:.2f} "
        f"[{one.low:.2f}, {one.high:.2f}] over seeds.\n"
        f"{one.significant} orders are significant under both {first} and {second}, "
        f"{one.contradicted} of them opposite.\n"
    )
    if one.repeated is not None:
        text += f"Two sets of as many seeds of {first} alone: tau {one.repeated:.2f} on average.\n"
    return text
