"""What was submitted, on disk: the graph, the cluster, and which job runs which stage.

A submission is a folder, written before anything is submitted and only appended to afterwards.
Each job's comment names the stages it runs, so a submission that is killed before it records a job
id loses nothing.
"""

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import pydantic

from g2rpo.config import StrictModel, validate
from g2rpo.errors import UserError
from g2rpo.files import append_jsonl, guarded_folder, write_json
from slurm.cluster import Cluster
from slurm.graph import Graph, Stage

RECORD, JOBS = "submission.json", "jobs.jsonl"


class DamagedRecord(UserError):  # noqa: N818 - a state of the file, not a mistake of the caller
    """The record of a submission is missing, damaged, or from another version of g2rpo."""


def job_comment(submission: str, number: str, stages: Sequence[str]) -> str:
    """The comment of a job or array: the submission and the stages, in order.

    SLURM itself can then say what a job runs, even if the submission's own record is lost.
    """
    start = os.path.commonprefix(list(stages))  # noqa: RUF071 - names, not paths
    ends = f"{{{','.join(name[len(start) :] for name in stages)}}}" if len(stages) > 1 else ""
    return f"g2rpo/{submission}/{number}/{start}{ends}"


def read_comment(comment: str) -> tuple[str, tuple[str, ...]] | None:
    """The submission and the stages of :func:`job_comment`; None for the comment of another job."""
    match = re.fullmatch(r"g2rpo/([^/]+)/\w+/([^{}]*)(?:\{([^{}]*)\})?", comment)
    if match is None:
        return None
    submission, start, ends = match.groups()
    return submission, (start,) if ends is None else tuple(start + end for end in ends.split(","))


class JobGroup(pydantic.BaseModel, frozen=True):
    """Stages that were submitted by one sbatch call, one job or array: a line of ``jobs.jsonl``."""

    comment: str = pydantic.Field(pattern="^g2rpo/[^/]+/")
    """The job's comment, by which it is found in SLURM without its id."""
    stages: tuple[str, ...] = pydantic.Field(min_length=1)
    """Stage names; in an array, by index."""
    job: str = pydantic.Field(pattern="^[0-9]+$")
    """The id of the job or array."""

    def job_of(self, stage: str) -> str:
        """The job id of one of its stages, with the array index if there is one."""
        return self.job if len(self.stages) == 1 else f"{self.job}_{self.stages.index(stage)}"


class Submission(StrictModel):
    """One submission, as ``submission.json`` in its folder records it."""

    folder: Path = pydantic.Field(exclude=True)
    format: Literal[2] = 2
    title: str
    """What is run, for people."""
    entry: str
    """``module:function`` that runs a stage, see :data:`slurm.job.Entry`."""
    directory: Path
    """The working directory of its jobs; relative paths are relative to it."""
    cluster: Cluster
    """Where it was submitted to."""
    created: float
    """In seconds since the epoch."""
    done: frozenset[str] = frozenset()
    """Stages that were already complete when it was submitted."""
    stages: tuple[Stage, ...]
    """All its stages, including those that were already complete."""

    @cached_property
    def graph(self) -> Graph:
        """Its stages in dependency order."""
        return Graph(self.stages)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def jobs_folder(self) -> Path:
        """The folder of batch scripts and logs: one per submission, since a new cluster starts job
        ids at 1 again."""
        return self.folder / "jobs"

    def local_log(self, stage: str) -> Path:
        """The log of a stage that runs on this machine."""
        return self.folder / "logs" / f"{stage.replace('/', '--')}.log"

    def save(self) -> None:
        """Writes the record."""
        write_json(self.folder / RECORD, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> "Submission":
        """Reads the submission in ``folder``.

        Raises:
            DamagedRecord: the record is missing, damaged, or from another version.
            UserError: the record cannot be read.
        """
        path = folder / RECORD
        try:
            submission = validate(cls, {**json.loads(path.read_bytes()), "folder": folder}, "")
            len(submission.graph)
        except (FileNotFoundError, IsADirectoryError, ValueError, TypeError, UserError) as error:
            problem = error.strerror if isinstance(error, OSError) else str(error).lstrip(": ")
            raise DamagedRecord(
                f"{path}: damaged, or from another version of g2rpo ({problem}); run the same "
                "`g2rpo reproduce` again"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        return submission

    def submitted(self, comment: str, stages: Sequence[str], job: str) -> None:
        """Records that ``stages`` were submitted together, as ``job``."""
        line = {"comment": comment, "stages": list(stages), "job": job, "time": time.time()}
        append_jsonl(self.folder / JOBS, [line])


def job_groups(folder: Path) -> list[JobGroup]:
    """The jobs recorded so far for the submission in ``folder``, the latest last.

    Lines that a kill cut short, or that are damaged, are skipped: SLURM knows those jobs by their
    comment.
    """
    groups = []
    try:
        lines = (folder / JOBS).read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(pydantic.ValidationError):
            groups.append(JobGroup.model_validate_json(line))
    return groups


def new_folder(submissions: Path, title: str) -> Path:
    """Creates a folder for a submission, named by title and time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = submissions / f"{title}-{stamp}-{secrets.token_hex(2)}"
    guarded_folder(folder)
    return folder


def list_submissions(submissions: Path) -> list[Path]:
    """The folders of all submissions, the oldest first, including those with a lost record."""
    made = {path.parent: path.stat().st_mtime for path in submissions.glob(f"*/{JOBS}")}
    made |= {path.parent: path.stat().st_mtime for path in submissions.glob(f"*/{RECORD}")}
    return sorted(made, key=lambda folder: (made[folder], folder))
