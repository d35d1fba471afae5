"""Submitting stages: batches in order, each depending on the jobs of what it needs."""

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from g2rpo.errors import UserError
from g2rpo.files import atomic_write_text
from slurm import states
from slurm.batch import Batch, script
from slurm.graph import Stage
from slurm.submission import Submission, job_comment

ARRAY = 64
"""Stages of one array at most: their names have to fit into its comment."""
SBATCH_SECONDS = 300.0
"""How long sbatch may take: a busy controller makes it wait."""


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
        made.append(Script(names, _script(submission, batch)))
        job_of |= dict.fromkeys(names, f"<{_shown(stages)}>")
    return made


def _script(submission: Submission, batch: Batch) -> str:
    # Jobs write to the folder with the submissions folder in it.
    results = submission.folder.parent.parent
    return script(submission.cluster, batch, submission.jobs_folder, results)


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
    job_of = dict(active)
    for stages in batches(todo):
        names = [stage.name for stage in stages]
        number = secrets.token_hex(4)
        comment = job_comment(submission.name, number, names)
        text = _script(submission, Batch(comment, stages, dependency(stages, job_of)))
        path = submission.jobs_folder / f"{number}_submission.sh"
        atomic_write_text(path, text)
        job = _sbatch(path, _shown(stages))
        submission.submitted(comment, names, job)
        job_of |= dict.fromkeys(names, job)


def _sbatch(path: Path, what: str) -> str:
    """Submits a batch script; returns the id of its job."""
    try:
        told = states.ask("sbatch", "--parsable", str(path), seconds=SBATCH_SECONDS)
        found = re.search(r"^(\d+)(;.*)?$", told, re.MULTILINE)
        if found is None:
            raise UserError(f"sbatch gave no job id, but {told.strip()[:200]!r}")
    except UserError as error:
        kind = DependencyGone if "dependency" in str(error).lower() else UserError
        raise kind(
            f"SLURM did not take {what}: {error}; what was submitted before goes on "
            "(`g2rpo status`); fix it and run the same command"
        ) from None
    return found[1]
