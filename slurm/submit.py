"""Submitting stages: batches in order, each depending on the jobs of what it needs."""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError

from g2rpo.errors import UserError
from g2rpo.files import guarded_folder
from slurm import states
from slurm.batch import SBATCH_SECONDS, Batch, command, executor, script
from slurm.graph import Stage
from slurm.submission import Submission, job_comment

ARRAY = 64
"""Stages of one array at most: their names have to fit into its comment."""


class DependencyGone(UserError):  # noqa: N818 - it is what has happened
    """A job that was to be waited for ended just now, and SLURM has forgotten it already."""


@dataclass(frozen=True)
class Script:
    """The batch script of some stages, as it would be submitted.

    Attributes:
        stages: their names, by array index.
        text: the script; ids of jobs that do not exist yet are in angle brackets.
    """

    stages: tuple[str, ...]
    text: str


def batches(todo: Iterable[Stage]) -> Iterator[tuple[Stage, ...]]:
    """The stages that are submitted together; ``todo`` has those first that others wait for."""
    arrays: dict[str, list[Stage]] = {}
    for stage in todo:
        arrays.setdefault(stage.array or stage.name, []).append(stage)
    for stages in arrays.values():
        for start in range(0, len(stages), ARRAY):
            yield tuple(stages[start : start + ARRAY])


def dependency(stages: Sequence[Stage], job_of: Mapping[str, str]) -> str | None:
    """sbatch's ``--dependency`` of stages that are submitted together.

    Args:
        stages: the stages.
        job_of: the job of each stage that is waited for: an array that was submitted just now as
            a whole, of an older one the task, since others of it may have failed.
    """
    parts = []
    for word, names in (
        ("afterok", [name for stage in stages for name in stage.needs]),
        ("afterany", [name for stage in stages for name in stage.after]),
    ):
        jobs = dict.fromkeys(job_of[name] for name in names if name in job_of)
        if jobs:
            parts.append(":".join((word, *jobs)))
    return ",".join(parts) or None


def scripts(
    submission: Submission, todo: Iterable[Stage], active: Mapping[str, str]
) -> list[Script]:
    """The batch scripts of all that is to do, exactly as :func:`submit` would submit them.

    Args:
        submission: the submission; it need not be saved.
        todo: the stages that are to do.
        active: the jobs of stages that run or wait already, by stage.
    """
    job_of = dict(active)
    made = []
    for number, stages in enumerate(batches(todo), start=1):
        names = tuple(stage.name for stage in stages)
        comment = job_comment(submission.name, str(number), names)
        batch = Batch(comment, stages, dependency(stages, job_of))
        text = script(submission.cluster, batch, submission.jobs_folder, _results(submission))
        made.append(Script(names, text))
        job_of |= dict.fromkeys(names, f"<{_shown(stages)}>")
    return made


def _results(submission: Submission) -> Path:
    """The folder that jobs write to: the one with the submissions folder in it."""
    return submission.folder.parent.parent


def _shown(stages: Sequence[Stage]) -> str:
    first = stages[0].name
    return first if len(stages) == 1 else f"array of {first}"


def submit(submission: Submission, todo: Iterable[Stage], active: Mapping[str, str]) -> None:
    """Submits all that is to do.

    A job says in its comment which stages it runs, so an error or a kill at any point loses
    nothing: the rest is submitted the next time.

    Args:
        submission: a saved submission.
        todo: the stages that are to do and have no job.
        active: the jobs of stages that run or wait already, by stage.

    Raises:
        DependencyGone: SLURM does not know one of ``active`` any more.
        UserError: SLURM refuses a job; what was submitted before stays.
    """
    guarded_folder(submission.jobs_folder)  # jobs run the scripts in it
    job_of = dict(active)
    for stages in batches(todo):
        names = [stage.name for stage in stages]
        comment = job_comment(submission.name, secrets.token_hex(4), names)
        job = _submit_batch(submission, Batch(comment, stages, dependency(stages, job_of)))
        submission.submitted(comment, names, job)
        job_of |= dict.fromkeys(names, job)


def _submit_batch(submission: Submission, batch: Batch) -> str:
    """Submits a batch; returns the id of its job."""
    place = (submission.cluster, batch, submission.jobs_folder, _results(submission))
    try:
        return executor(*place).submit_command(command(*place))
    except FailedSubmissionError:
        reason = "sbatch gave no job id"
    except (FailedJobError, OSError) as error:
        reason = states.error_of(str(error)) or f"sbatch did not answer within {SBATCH_SECONDS} s"
    kind = DependencyGone if "dependency" in reason.lower() else UserError
    raise kind(
        f"SLURM did not take {_shown(batch.stages)}: {reason}; what was submitted before stays "
        "submitted (`g2rpo status`); fix it and run the same command"
    )
