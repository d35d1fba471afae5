"""The stages of a cell, and whether it is finished."""

from collections.abc import Iterable, Sequence

from g2rpo.errors import UserError
from reproduce.experiment import ResolvedCell
from reproduce.experiment.layout import Layout
from reproduce.stages.base import Stage
from reproduce.stages.evaluation import Sample, Score
from reproduce.stages.shares import Share
from reproduce.stages.training import Credit, Train
from reproduce.tables.notes import Gap


def cell_stages(cell: ResolvedCell, layout: Layout) -> list[Sequence[Stage]]:
    """The stages of a cell, those together that can run at once, each after the ones before."""
    if cell.credit is not None:
        return [[Credit(layout, cell)]]
    count = cell.profile.hardware.evaluation_shares
    shares = [Share(index, count) for index in range(count)]
    evaluation: list[Sequence[Stage]] = [
        [Sample(layout, cell, share) for share in shares],
        [Score(layout, cell, share) for share in shares],
    ]
    return evaluation if cell.train is None else [[Train(layout, cell)], *evaluation]


def finish_cells(
    cells: Iterable[ResolvedCell], layout: Layout
) -> tuple[list[ResolvedCell], list[Gap]]:
    """The cells that are finished, their results put together, and why the others are not."""
    finished: list[ResolvedCell] = []
    gaps: list[Gap] = []
    for cell in cells:
        try:
            reason = finish_cell(cell, layout)
        except UserError as error:
            reason = str(error)
        if reason is None:
            finished.append(cell)
        else:
            gaps.append(Gap(cell.key, reason, cell.seed))
    return finished, gaps


def finish_cell(cell: ResolvedCell, layout: Layout) -> str | None:
    """Puts a cell's results together; why they are not all there, in one line, else None."""
    last = cell_stages(cell, layout)[-1]
    if all(stage.is_done() for stage in last):
        last[0].finish()
        return None
    return why_not(cell, layout)


def why_not(cell: ResolvedCell, layout: Layout) -> str:
    """Why a cell is not finished, in one line: the first of its stages that is not done."""
    stages = [stage for several in cell_stages(cell, layout) for stage in several]
    left = next((stage for stage in stages if not stage.is_done()), None)
    if left is None:
        return "its scores are not put together yet"
    return left.state(what=left.kind).reason or f"{left.kind} is running"
