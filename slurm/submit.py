"""Submits stages: batches in order, each with the jobs it depends on."""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence

from submitit.core.utils import FailedJobError, FailedSubmissionError

from g2rpo.errors import UserError
from g2rpo.files import guarded_folder
from slurm import states
from slurm.batch import SBATCH_SECONDS, Batch
from slurm.graph import Stage
from slurm.submission import Submission, job_comment

ARRAY = 64
"""Maximum stages per array: their names must fit in its comment."""


class DependencyGone(UserError):  # noqa: N818 - an event, not a mistake of the caller
    """A job that others depend on has just ended, and SLURM no longer knows it."""


def batches(todo: Iterable[Stage]) -> Iterator[tuple[Stage, ...]]:
    """Groups the stages that are submitted together; ``todo`` is in dependency order."""
    arrays: dict[str, list[Stage]] = {}
    for stage in todo:
        arrays.setdefault(stage.array or stage.name, []).append(stage)
    for stages in arrays.values():
        for start in range(0, len(stages), ARRAY):
            yield tuple(stages[start : start + ARRAY])


def dependency(stages: Sequence[Stage], job_of: Mapping[str, str]) -> str | None:
    """sbatch's ``--dependency`` for stages that are submitted together.

    Args:
        stages: the stages.
        job_of: the job of each pending or running stage: the id of the whole array if it was just
            submitted, of one task if it is older, since other tasks may have failed.
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
) -> list[tuple[tuple[str, ...], str]]:
    """The batch scripts of ``todo``, exactly as :func:`submit` would submit them.

    Jobs that do not exist yet are stage names in angle brackets.

    Returns:
        the names of the stages of each script, by array index, and its text.
    """
    job_of = dict(active)
    made = []
    for number, stages in enumerate(batches(todo), start=1):
        batch = _batch(submission, stages, str(number), job_of)
        names = tuple(stage.name for stage in stages)
        made.append((names, batch.script()))
        job_of |= dict.fromkeys(names, f"<{_shown(stages)}>")
    return made


def submit(submission: Submission, todo: Iterable[Stage], active: Mapping[str, str]) -> None:
    """Submits ``todo``.

    Each job names its stages in its comment, so an error or a kill at any point loses nothing: the
    next call submits the rest.

    Args:
        submission: a saved submission.
        todo: the stages to submit, which have no job.
        active: the jobs of pending and running stages, by stage.

    Raises:
        DependencyGone: SLURM no longer knows one of ``active``.
        UserError: SLURM rejects a job; those submitted before stay submitted.
    """
    guarded_folder(submission.jobs_folder)  # jobs run the scripts in it
    job_of = dict(active)
    for stages in batches(todo):
        batch = _batch(submission, stages, secrets.token_hex(4), job_of)
        job = _submit(batch)
        names = [stage.name for stage in stages]
        submission.submitted(batch.comment, names, job)
        job_of |= dict.fromkeys(names, job)


def _batch(
    submission: Submission, stages: tuple[Stage, ...], number: str, job_of: Mapping[str, str]
) -> Batch:
    comment = job_comment(submission.name, number, [stage.name for stage in stages])
    results = submission.folder.parent.parent
    depends = dependency(stages, job_of)
    return Batch(submission.cluster, submission.jobs_folder, results, comment, stages, depends)


def _shown(stages: Sequence[Stage]) -> str:
    first = stages[0].name
    return first if len(stages) == 1 else f"array of {first}"


def _submit(batch: Batch) -> str:
    try:
        return batch.submit()
    except FailedSubmissionError:
        reason = "sbatch returned no job id"
    except (FailedJobError, OSError) as error:
        reason = states.error_of(str(error)) or f"sbatch did not answer within {SBATCH_SECONDS} s"
    kind = DependencyGone if "dependency" in reason.lower() else UserError
    raise kind(
        f"cannot submit {_shown(batch.stages)}: {reason}; jobs submitted before it stay queued "
        "(`g2rpo status`); fix this and run the same command again"
    )
