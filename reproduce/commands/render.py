"""``g2rpo render``: an experiment's table from its finished cells, or what its credit is."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from g2rpo.errors import UserError
from reproduce.commands.options import (
    ExperimentName,
    ProfileName,
    PublishedCells,
    Results,
    layout_of,
)

if TYPE_CHECKING:
    from reproduce.experiment import Experiment, Profile
    from reproduce.experiment.layout import Layout

_MEASUREMENT = re.compile(r"credit-.+-seed(\d+)-[0-9a-f]+")
"""The folder of one in ``results/runs``, as :meth:`Layout.credit` names it."""


def render(
    experiment: ExperimentName,
    profile: ProfileName = "mini",
    results: Results = Path("results"),
    publish: PublishedCells = False,
) -> None:
    """Write and print an experiment's table and figures from its finished cells."""
    from benchmarks.evaluation.results import cells_folder, load_cells
    from reproduce import experiment as experiments
    from reproduce.tables.publish import publish as write_table

    chosen = experiments.load_profile(profile)
    loaded = experiments.load_experiment(experiment)
    layout = layout_of(results, publish=publish)
    command = f"g2rpo reproduce {experiment} --profile {profile}"
    if loaded.credit is not None:
        render_credit(loaded, chosen, layout, command)
        return
    folder = cells_folder(layout.tables, chosen.name, loaded.name)
    cells = load_cells(folder)
    if not cells:
        raise UserError(f"{folder}: no finished cells; run `{command}`")
    write_table(loaded, chosen, cells, (), layout)


def render_credit(
    experiment: "Experiment", profile: "Profile", layout: "Layout", command: str
) -> None:
    """Writes and prints what has been measured of an experiment on credit.

    Args:
        experiment: the experiment.
        profile: the scale.
        layout: where measurements are and their tables go.
        command: measures it, as a user would type it.

    Raises:
        UserError: nothing has; in one line, with where its published document is.
    """
    from reproduce.experiment import expand
    from reproduce.jobs.runner import build_assets
    from reproduce.stages.training import Credit
    from reproduce.tables.credit import publish_credit  # draws: seconds

    names = (_MEASUREMENT.fullmatch(folder.name) for folder in layout.runs.glob("credit-*"))
    seeds = sorted({int(name[1]) for name in names if name is not None})
    cells = []
    if seeds:
        build_assets(profile)
        expanded = expand(experiment, profile, seeds)
        cells = [cell for cell in expanded if Credit(layout, cell).is_done()]
    if not cells:
        raise UserError(_nothing_measured(experiment, profile, layout, command))
    publish_credit(experiment, profile, cells, (), layout)


def credit_document(experiment: "Experiment", profile: "Profile", layout: "Layout") -> Path | None:
    """The words of an experiment on credit, or its published ones; None where there are none."""
    from reproduce.experiment.layout import Layout

    published = Layout(layout.runs, layout.runs.parent)
    folders = (at.experiment(profile.name, experiment.name) for at in (layout, published))
    return next((path for at in folders if (path := at / "credit.md").is_file()), None)


def _nothing_measured(
    experiment: "Experiment", profile: "Profile", layout: "Layout", command: str
) -> str:
    document = credit_document(experiment, profile, layout)
    if document is None:
        return f"{layout.runs}: no measurements of {experiment.name}; run `{command}`"
    return (
        f"{document} is there, but not the measurements in {layout.runs} that it was made from; "
        f"`{command}` measures and renders it anew"
    )


def no_table(experiment: "Experiment", profile: "Profile", layout: "Layout", command: str) -> str:
    """Where an experiment on credit is shown, which has no table of runs to report."""
    document = credit_document(experiment, profile, layout)
    if document is None:
        return _nothing_measured(experiment, profile, layout, command)
    # The report finds words by the name of their folder.
    among = document.stem == document.parent.name
    shown = "; a report without names shows it under In words" if among else ""
    return f"{experiment.name} is no table of runs: what was found is in {document}{shown}"
