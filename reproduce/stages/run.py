"""The entry point of jobs: runs one stage of a submission."""

import logging
import os

from g2rpo.files import writable_by_others
from reproduce.stages.base import CellStage, Stage, perform
from reproduce.stages.cells import Sample, Score
from reproduce.stages.embedding import Embed
from reproduce.stages.inputs import Inputs
from reproduce.stages.render import Render
from reproduce.stages.training import Credit, Train
from slurm import graph
from slurm.distributed import Ranks
from slurm.submission import Submission

logger = logging.getLogger(__name__)
ENTRY = "reproduce.stages.run:run_stage"
CELL_STAGES: dict[str, type[CellStage]] = {
    stage.kind: stage for stage in (Train, Sample, Score, Credit)
}
CLASSES: dict[str, type[Stage]] = {"embed": Embed, **CELL_STAGES, "render": Render}


def load_stage(inputs: Inputs, node: graph.Stage) -> Stage:
    """The stage of ``node`` in the graph of a submission."""
    return CLASSES[node.kind].load(inputs, node.payload)


def run_stage(submission: Submission, node: graph.Stage, ranks: Ranks) -> None:
    """Runs one stage of a submission.

    Raises:
        UserError: the stage fails.
        Stopped: the process was asked to stop.
    """
    for folder in (submission.folder, submission.jobs_folder):
        if folder.is_dir() and writable_by_others(folder):
            logger.warning(
                "%s: others can write to this folder of code for jobs; run `chmod go-w` on it",
                folder,
            )
    os.chdir(submission.directory)
    perform(load_stage(Inputs.load(submission.folder), node), ranks)
