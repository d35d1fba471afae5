"""Submitting stages: batches in order, each depending on the jobs of what it needs."""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError

from g2rpo.errors import UserError
from g2rpo.files import guarded_folder
from slurm.batch import Batch, executor
from slurm.graph import Stage
from slurm.job import StageJob
from slurm.submission import Submission


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
        yield tuple(stages)


def dependency(stages: Sequence[Stage], job_of: Mapping[str, str]) -> str | None:
    """sbatch's ``--dependency`` of stages that are submitted together.

    Args:
        stages: the stages.
        job_of: the job of each stage that is waited for; the others are done.
    """
    parts = []
    for word, names in (
        ("afterok", [name for stage in stages for name in stage.needs]),
        ("afterany", [name for stage in stages for name in stage.after]),
    ):
        # A whole array is waited for by its own id.
        jobs = dict.fromkeys(job_of[name].split("_")[0] for name in names if name in job_of)
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
        batch = Batch(f"g2rpo/{submission.name}/{number}", stages, dependency(stages, job_of))
        job_of |= {stage.name: f"<{_shown(stages)}>" for stage in stages}
        run = executor(submission.cluster, batch, submission.jobs_folder, _results(submission))
        made.append(Script(tuple(stage.name for stage in stages), run.text(len(stages))))
    return made


def _shown(stages: Sequence[Stage]) -> str:
    first = stages[0].name
    return first if len(stages) == 1 else f"array of {first}"


def _results(submission: Submission) -> Path:
    """The folder that jobs write to: the one with the submissions folder in it."""
    return submission.folder.parent.parent


def submit(
    submission: Submission, todo: Iterable[Stage], active: Mapping[str, str]
) -> dict[str, str]:
    """Submits all that is to do; returns the job of each stage.

    What was submitted is recorded at once, so an error or a kill in between loses nothing: the
    rest is submitted the next time.

    Args:
        submission: a saved submission.
        todo: the stages that are to do and have no job.
        active: the jobs of stages that run or wait already, by stage.

    Raises:
        UserError: SLURM refuses a job; what was submitted before stays.
    """
    guarded_folder(submission.jobs_folder)  # jobs unpickle what is in it
    job_of = dict(active)
    made: dict[str, str] = {}
    for stages in batches(todo):
        comment = f"g2rpo/{submission.name}/{secrets.token_hex(4)}"
        batch = Batch(comment, stages, dependency(stages, job_of))
        job = _submit_batch(submission, batch)
        for index, stage in enumerate(stages):
            made[stage.name] = job if len(stages) == 1 else f"{job}_{index}"
        job_of |= made
    return made


def _submit_batch(submission: Submission, batch: Batch) -> str:
    run = executor(submission.cluster, batch, submission.jobs_folder, _results(submission))
    submission.announce(batch.comment, [stage.name for stage in batch.stages])
    functions = [StageJob(str(submission.folder), stage.name) for stage in batch.stages]
    try:
        with run.batch():
            jobs = [run.submit(function) for function in functions]
        job = str(jobs[0].job_id).split("_")[0]
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise UserError(
            f"SLURM did not take {_shown(batch.stages)}: {_reason(error)}; what was submitted "
            "before goes on (`g2rpo status`); mend it and run the same command"
        ) from None
    submission.submitted(batch.comment, job)
    return job


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "error:" in line] or lines[-1:]
    return " ".join(told)[:300] or type(error).__name__
