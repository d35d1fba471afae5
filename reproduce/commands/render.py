"""``g2rpo render``: an experiment's table from its finished cells."""

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
    from reproduce.experiment import Experiment


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
    command = f"g2rpo reproduce {experiment} --profile {profile}"
    refuse_credit(loaded, command)
    layout = layout_of(results, publish=publish)
    folder = cells_folder(layout.tables, chosen.name, loaded.name)
    cells = load_cells(folder)
    if not cells:
        raise UserError(f"{folder}: no finished cells; run `{command}`")
    write_table(loaded, chosen, cells, (), layout)


def refuse_credit(experiment: "Experiment", command: str) -> None:
    """Raises a :class:`UserError` for an experiment that measures credit: it has no cells."""
    if experiment.credit is not None:
        raise UserError(
            f"{experiment.name} measures credit and has no cells; run `{command}`, which writes "
            "credit.md from what is already measured"
        )
