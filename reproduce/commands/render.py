"""``g2rpo render`` and ``report`` of an experiment on credit, which has no cells of its own."""

import re
from pathlib import Path

from g2rpo.errors import UserError
from reproduce.experiment import Experiment, Profile, expand
from reproduce.experiment.layout import Layout

_MEASUREMENT = re.compile(r"credit-.+-seed(\d+)-[0-9a-f]+")
"""The folder of one in ``results/runs``, as :meth:`Layout.credit` names it."""


def render_credit(experiment: Experiment, profile: Profile, layout: Layout, command: str) -> None:
    """Writes and prints what has been measured of an experiment on credit.

    Args:
        experiment: the experiment.
        profile: the scale.
        layout: where measurements are and their tables go.
        command: measures it, as a user would type it.

    Raises:
        UserError: nothing has; in one line, with where its published document is.
    """
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


def credit_document(experiment: Experiment, profile: Profile, layout: Layout) -> Path | None:
    """The words of an experiment on credit, or its published ones; None where there are none."""
    published = Layout(layout.runs, layout.runs.parent)
    folders = (at.experiment(profile.name, experiment.name) for at in (layout, published))
    return next((path for at in folders if (path := at / "credit.md").is_file()), None)


def _nothing_measured(
    experiment: Experiment, profile: Profile, layout: Layout, command: str
) -> str:
    document = credit_document(experiment, profile, layout)
    if document is None:
        return f"{layout.runs}: no measurements of {experiment.name}; run `{command}`"
    return (
        f"{document} is there, but not the measurements in {layout.runs} that it was made from; "
        f"`{command}` measures and renders it anew"
    )


def no_table(experiment: Experiment, profile: Profile, layout: Layout, command: str) -> str:
    """Where an experiment on credit is shown, which has no table of runs to report."""
    document = credit_document(experiment, profile, layout)
    if document is None:
        return _nothing_measured(experiment, profile, layout, command)
    # The report finds words by the name of their folder.
    among = document.stem == document.parent.name
    shown = "; a report without names shows it under In words" if among else ""
    return f"{experiment.name} is no table of runs: what was found is in {document}{shown}"
