"""What runs inside a job: one stage, with its signals, its ranks, and a meaningful exit code."""

import errno
import logging
import os
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from g2rpo.errors import UserError
from g2rpo.owner import slurm_job_id
from g2rpo.stop import Stopped, StoppedAlone, StopRequest
from g2rpo.text import visible
from slurm.distributed import Ranks, exit_rank, join
from slurm.graph import Stage
from slurm.submission import Submission

logger = logging.getLogger(__name__)

REQUEUE = 85
"""Exit code of a job that stopped in time to resume: its batch script requeues it."""
TERMINATED = 143
"""Exit code of a job that was asked to end: it is not requeued."""

MARKER_SECONDS = 20.0
"""How long a rank waits for the first rank's marker to appear on a shared file system."""

Entry = Callable[[Submission, Stage, Ranks], None]


def main() -> None:
    """Runs one stage: ``python -m slurm.job SUBMISSION STAGE...``, in an array the task's own."""
    folder, *stages = sys.argv[1:]
    name = stages[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) if len(stages) > 1 else 0]
    with StopRequest.handle_signals():
        code = run_stage(Path(folder), name)
    exit_rank(code)


def run_stage(folder: Path, name: str) -> int:
    """Runs stage ``name`` of the submission in ``folder``; returns the exit code.

    0: complete; 2: an error explained in one line; 1: an error with its traceback;
    :data:`REQUEUE` or :data:`TERMINATED`: asked to stop.
    """
    try:
        submission = Submission.load(folder)
        stage = submission.graph[name]
        entry: Entry = pkgutil.resolve_name(submission.entry)
        with join(stage.resources.ranks) as ranks:
            try:
                entry(submission, stage, ranks)
            except Stopped as stopped:
                return _stopped(submission, stopped, ranks)
    except Exception as error:
        return _failed(error)
    return 0


def _failed(error: Exception) -> int:
    """Reports an error: in one line if that is enough to fix it."""
    message = None
    if isinstance(error, UserError):
        message = str(error)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}disk full or quota exceeded; free some space and run the same command"
    elif type(error).__name__ == "OutOfMemoryError":
        message = f"out of memory on the GPU ({' '.join(str(error).split())[:200]})"
    if message is None:
        traceback.print_exception(error)
        return 1
    sys.stderr.write(visible(f"error: {message}") + "\n")
    sys.stderr.flush()
    return 2


def requeue_marker(jobs: Path, job: str) -> Path:
    """The file by which a job asks its batch script to requeue it."""
    return jobs / f"{job}.requeue"


def _stopped(submission: Submission, stopped: Stopped, ranks: Ranks) -> int:
    sys.stderr.write(f"{stopped}; progress is saved\n")
    sys.stderr.flush()
    job = slurm_job_id()
    # A local run may itself be inside a job, whose batch script does not look for markers.
    if not stopped.resume or job is None or submission.cluster.kind != "slurm":
        return TERMINATED
    marker = requeue_marker(submission.jobs_folder, job)
    if ranks.first or isinstance(stopped, StoppedAlone):
        marker.touch()
    # srun kills the other ranks when one exits, so none may exit before the marker exists.
    deadline = time.monotonic() + MARKER_SECONDS
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return REQUEUE


if __name__ == "__main__":
    main()
