"""What was submitted, on disk: the graph, the cluster, and which job runs which stage.

A submission is a folder. It is written before anything is submitted and only added to afterwards.
The comment of each job says which stages it runs, so nothing is lost when the submitting shell is
killed before it could note the job's id.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic

from g2rpo.config import StrictModel, validate
from g2rpo.errors import UserError
from g2rpo.files import append_jsonl, atomic_write_bytes, guarded_folder, write_json
from slurm.cluster import Cluster
from slurm.graph import Graph, Stage

FORMAT = 2
RECORD, COPY, JOBS = "submission.json", "submission-copy.json", "jobs.jsonl"
logger = logging.getLogger(__name__)


class DamagedRecord(UserError):  # noqa: N818 - it is what was found
    """The record of a submission is not there, or not whole, or not of this version."""


class OtherVersion(DamagedRecord):
    """Another version of g2rpo wrote the record."""


def job_comment(submission: str, number: str, stages: Sequence[str]) -> str:
    """The comment of a job or an array: it names the submission and the stages, in order.

    So SLURM itself says what a job does, also where no record of it was written or is left.
    """
    start = os.path.commonprefix(list(stages))  # noqa: RUF071 - names, not paths
    ends = f"{{{','.join(name[len(start) :] for name in stages)}}}" if len(stages) > 1 else ""
    return f"g2rpo/{submission}/{number}/{start}{ends}"


def read_comment(comment: str) -> tuple[str, tuple[str, ...]] | None:
    """The submission and the stages of :func:`job_comment`; None for the comment of another job."""
    found = re.fullmatch(r"g2rpo/([^/]+)/\w+/([^{}]*)(?:\{([^{}]*)\})?", comment)
    if found is None:
        return None
    submission, start, ends = found.groups()
    return submission, (start,) if ends is None else tuple(start + end for end in ends.split(","))


@dataclass(frozen=True)
class JobGroup:
    """Stages that were submitted by one sbatch call: one job, or one array.

    Attributes:
        comment: names the group in SLURM, so that it is found there without its id.
        stages: their names; in an array, by index.
        job: the id of the job or of the array; None where only earlier versions announced it.
    """

    comment: str
    stages: tuple[str, ...]
    job: str | None = None

    def job_of(self, stage: str) -> str | None:
        """The job id of one of its stages, with the array index where it has one."""
        if self.job is None or len(self.stages) == 1:
            return self.job
        return f"{self.job}_{self.stages.index(stage)}"


@dataclass(frozen=True)
class Submission:
    """One submission.

    Attributes:
        folder: where it is kept.
        title: what is run, for people.
        entry: ``module:function`` that runs a stage, see :data:`slurm.job.Entry`.
        directory: the working directory of its jobs; relative paths are relative to it.
        cluster: where it was submitted to.
        graph: all its stages, those that were done already too.
        created: when, in seconds since the epoch.
        done: stages that were complete when it was made.
    """

    folder: Path
    title: str
    entry: str
    directory: Path
    cluster: Cluster
    graph: Graph
    created: float
    done: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def jobs_folder(self) -> Path:
        """Where batch scripts and logs are kept: one folder per submission, since job ids start
        again at 1 on a new cluster."""
        return self.folder / "jobs"

    def local_log(self, stage: str) -> Path:
        """The log of a stage that runs on this machine."""
        return self.folder / "logs" / f"{stage.replace('/', '--')}.log"

    def save(self) -> None:
        """Writes the submission, but for its jobs; twice, since all its jobs read it."""
        record = _Record(
            format=FORMAT,
            stages=tuple(self.graph.stages.values()),
            **{name: getattr(self, name) for name in _KEPT},
        ).model_dump(mode="json")
        for name in (COPY, RECORD):
            write_json(self.folder / name, record)

    @classmethod
    def load(cls, folder: Path) -> "Submission":
        """Reads a submission; a damaged record is set aside, and its copy takes its place.

        Raises:
            DamagedRecord: there is none in ``folder``, it and its copy are damaged, or another
                version wrote them.
            UserError: it may not be read.
        """
        try:
            return cls._read(folder / RECORD)
        except DamagedRecord as error:
            try:
                found = cls._read(folder / COPY)
            except UserError:
                raise error from None
            logger.warning("%s; set aside as %s.damaged, its copy is used", error, RECORD)
        with contextlib.suppress(OSError):  # where this user may not write, the copy is read again
            _restore(folder)
        return found

    @classmethod
    def _read(cls, path: Path) -> "Submission":
        try:
            data = json.loads(path.read_bytes())
        except (FileNotFoundError, IsADirectoryError, ValueError) as error:
            told = error.strerror if isinstance(error, OSError) else error
            raise DamagedRecord(f"{path}: cannot be read ({told})") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
            raise OtherVersion(
                f"{path}: written by another version of g2rpo; the same `g2rpo reproduce` submits "
                "again what is left"
            )
        try:
            record = validate(_Record, data, str(path))
            graph = Graph(record.stages)
        except (UserError, ValueError) as error:
            told = str(error).removeprefix(f"{path}: ")
            raise DamagedRecord(f"{path}: is damaged ({told})") from None
        return cls(path.parent, graph=graph, **{name: getattr(record, name) for name in _KEPT})

    def submitted(self, comment: str, stages: Sequence[str], job: str) -> None:
        """Notes that ``stages`` were submitted together, as ``job``."""
        line = {"comment": comment, "stages": list(stages), "job": job, "time": time.time()}
        append_jsonl(self.folder / JOBS, [line])


def _restore(folder: Path) -> None:
    path, copy = folder / RECORD, folder / COPY
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.with_name(f"{RECORD}.damaged"))
    atomic_write_bytes(path, copy.read_bytes())
    times = copy.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # submissions are listed by it


_KEPT = ("title", "entry", "directory", "cluster", "created", "done")


class _Record(StrictModel):
    """What ``submission.json`` holds."""

    format: int
    title: str
    entry: str
    directory: Path
    cluster: Cluster
    created: float
    done: frozenset[str]
    stages: tuple[Stage, ...]


class _Line(pydantic.BaseModel):
    """A line of ``jobs.jsonl``; earlier versions wrote the stages before and the job after."""

    comment: str = pydantic.Field(pattern="^g2rpo/[^/]+/")
    stages: tuple[str, ...] = ()
    job: str | None = pydantic.Field(None, pattern="^[0-9]+$")


def _lines(path: Path) -> list[_Line]:
    try:
        text = path.read_text(errors="replace")
    except OSError:  # SLURM knows the jobs too
        return []
    lines = []
    for line in text.splitlines():
        # One that a kill cut short, or that is damaged, leaves the others whole.
        with contextlib.suppress(pydantic.ValidationError):
            lines.append(_Line.model_validate_json(line))
    return lines


def job_groups(folder: Path) -> list[JobGroup]:
    """What was submitted so far of the submission in ``folder``, the latest last."""
    groups: dict[str, JobGroup] = {}
    for line in _lines(folder / JOBS):
        known = groups.get(line.comment)
        stages = line.stages or (known.stages if known else ())
        groups[line.comment] = JobGroup(line.comment, stages, line.job)
    return list(groups.values())


def new_folder(submissions: Path, title: str) -> Path:
    """A new folder for a submission; its name says what and when."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = submissions / f"{title}-{stamp}-{secrets.token_hex(2)}"
    guarded_folder(folder)
    return folder


def list_submissions(submissions: Path) -> list[Path]:
    """The folders of all submissions, the oldest first; those whose record is lost too."""
    made = {path.parent: path.stat().st_mtime for path in submissions.glob(f"*/{JOBS}")}
    made |= {path.parent: path.stat().st_mtime for path in submissions.glob(f"*/{RECORD}")}
    return sorted(made, key=lambda folder: (made[folder], folder))
