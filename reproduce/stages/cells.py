"""The stages of a cell, and whether the cell is finished."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from g2rpo.errors import UserError
from g2rpo.lease import Lease
from reproduce.experiment import ResolvedCell
from reproduce.experiment.layout import Layout
from reproduce.stages.base import Stage
from reproduce.stages.evaluation_files import EvaluationStage, Share
from reproduce.stages.training import Credit, Train
from reproduce.tables.notes import Gap


@dataclass(frozen=True)
class Sample(EvaluationStage):
    """Samples the held-out images of a share, and measures what else needs the policy."""

    kind = "sample"

    def is_done(self) -> bool:
        """Whether its images exist, or existed and have been scored."""
        return self.training.is_recorded() and self.is_sampled()

    def run(self) -> None:
        from reproduce.stages.sampling import sample_share  # slow: model libraries

        sample_share(self)


@dataclass(frozen=True)
class Score(EvaluationStage):
    """Scores the images of a share with every reward model of the profile."""

    kind = "score"

    def is_done(self) -> bool:
        return self.training.is_recorded() and self.is_scored()

    def run(self) -> None:
        from reproduce.stages.scoring import score_share  # slow: model libraries

        score_share(self)
        self.finish()

    def finish(self) -> bool:
        if self.is_merged():
            return True
        count = self.share.count
        if not all(self.of_share(index, count).is_scored() for index in range(count)):
            return False
        from reproduce.stages.scoring import merge_scores  # slow: model libraries

        with Lease.acquire(self.folder / "leases", "finish"):
            if not self.is_merged():
                merge_scores(self)
        return True


def cell_stages(cell: ResolvedCell, layout: Layout) -> list[Sequence[Stage]]:
    """The stages of a cell in order; those in one group can run at the same time."""
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
    """Merges the results of finished cells; returns those cells, and why the others are missing."""
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
    """Merges a cell's results; returns why they are incomplete, else None."""
    last = cell_stages(cell, layout)[-1]
    if all(stage.is_done() for stage in last):
        last[0].finish()
        return None
    return why_not(cell, layout)


def why_not(cell: ResolvedCell, layout: Layout) -> str:
    """Why a cell is not finished: the state of its first unfinished stage."""
    stages = [stage for several in cell_stages(cell, layout) for stage in several]
    left = next((stage for stage in stages if not stage.is_done()), None)
    if left is None:
        return "its scores are not merged yet"
    return left.state(what=left.kind).reason or f"{left.kind} is running"
