"""The last stage: collects the finished cells and writes the table, with gaps for the others."""

from collections.abc import Sequence

from benchmarks.evaluation.results import Cell, load_cell
from g2rpo.errors import UserError
from reproduce.experiment import Experiment, Profile, ResolvedCell
from reproduce.experiment.layout import Layout
from reproduce.jobs.plan import shares_of
from reproduce.stages.work import AnyWork, Inputs, Work, finish, latest_attempt
from reproduce.tables.collecting import collect, collected
from reproduce.tables.notes import Gap


def gather(
    cells: Sequence[ResolvedCell], layout: Layout, experiment: str
) -> tuple[list[Cell], list[Gap]]:
    """The finished cells, and why the others are not."""
    finished: list[Cell] = []
    gaps: list[Gap] = []
    for cell in cells:
        shares = cell.profile.hardware.evaluation_shares
        try:
            if finish(cell, layout, shares):
                known = collected(cell, layout, experiment)
                finished.append(known or load_cell(collect(cell, layout, experiment)))
            else:
                gaps.append(Gap(cell.key, why_not(cell, layout), cell.seed))
        except UserError as error:
            gaps.append(Gap(cell.key, str(error), cell.seed))
    # In one order, whoever finished first: what is written from them must come out the same.
    finished.sort(key=lambda cell: (cell.info.row, cell.info.seed or 0))
    return finished, gaps


def why_not(cell: ResolvedCell, layout: Layout) -> str:
    """Why a cell is not finished, in one line: the first of its stages that is not done."""
    shares = shares_of(cell.profile.hardware)
    works = [] if cell.train is None else [Work("train", cell, layout)]
    works += [Work(kind, cell, layout, share) for kind in ("sample", "score") for share in shares]
    left = next((work for work in works if not work.done()), None)
    return "its scores are not put together yet" if left is None else reason_of(left)


def reason_of(work: AnyWork) -> str:
    """Why ``work`` is not done, in one line."""
    attempt = latest_attempt(work.lease)
    if attempt is None or attempt.record is None:
        return f"{work.kind} has not run"
    if attempt.record.state == "done":
        return f"what {work.kind} wrote is missing or damaged; `g2rpo reproduce` makes it again"
    return attempt.record.reason or f"{work.kind} was interrupted"


def render(
    experiment: Experiment, profile: Profile, cells: Sequence[ResolvedCell], layout: Layout
) -> list[Gap]:
    """Writes and prints the table and the figures; returns the gaps."""
    # Drawing is not needed by other stages, and importing it takes seconds.
    if experiment.credit is not None:
        from reproduce.tables.credit import publish_credit

        return publish_credit(experiment, profile, cells, layout)
    from reproduce.tables.publish import publish

    finished, gaps = gather(cells, layout, experiment.name)
    publish(experiment, profile, finished, gaps, layout)
    return gaps


def render_stage(inputs: Inputs) -> None:
    """Renders the cells of a submission."""
    render(inputs.experiment, inputs.profile, inputs.cells(), inputs.layout)
