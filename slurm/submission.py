"""What was submitted, on disk: the graph, the cluster, and which job runs which stage.

A submission is a folder. It is written before anything is submitted and only added to afterwards,
so it is complete enough to go on from whenever the submitting shell was killed.
"""

import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.files import guarded_folder, write_json
from slurm.cluster import Cluster
from slurm.graph import Graph, Needs, Stage

FORMAT = 1


@dataclass(frozen=True)
class JobGroup:
    """Stages that were submitted by one sbatch call: one job, or one array.

    Attributes:
        comment: names the group in SLURM, so that it is found there without its id.
        stages: their names; in an array, by index.
        job: the id of the job or of the array; None until sbatch has answered.
        submitted: when, in seconds since the epoch.
    """

    comment: str
    stages: tuple[str, ...]
    job: str | None = None
    submitted: float = 0.0

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
        """Where submitit keeps batch scripts, pickles and logs: one folder per submission, since
        job ids start again at 1 on a new cluster."""
        return self.folder / "jobs"

    def local_log(self, stage: str) -> Path:
        """The log of a stage that runs on this machine."""
        return self.folder / "logs" / f"{stage.replace('/', '--')}.log"

    def save(self) -> None:
        """Writes the submission, but for its jobs."""
        write_json(
            self.folder / "submission.json",
            {
                "format": FORMAT,
                "title": self.title,
                "entry": self.entry,
                "directory": str(self.directory),
                "cluster": self.cluster.model_dump(mode="json"),
                "created": self.created,
                "done": sorted(self.done),
                "stages": [asdict(stage) for stage in self.graph.stages.values()],
            },
        )

    @classmethod
    def load(cls, folder: Path) -> "Submission":
        """Reads a submission.

        Raises:
            UserError: there is none in ``folder``, or another version wrote it.
        """
        path = folder / "submission.json"
        try:
            data = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); submit again") from None
        if data.get("format") != FORMAT:
            raise UserError(f"{path}: written by another version of g2rpo; submit again")
        return cls(
            folder,
            data["title"],
            data["entry"],
            Path(data["directory"]),
            validate(Cluster, data["cluster"], str(path)),
            Graph(_stage(stage) for stage in data["stages"]),
            data["created"],
            frozenset(data["done"]),
        )

    def announce(self, comment: str, stages: Sequence[str]) -> None:
        """Says that ``stages`` are about to be submitted together."""
        self._append({"comment": comment, "stages": list(stages)})

    def submitted(self, comment: str, job: str) -> None:
        """Says under which id they were."""
        self._append({"comment": comment, "job": job})

    def _append(self, line: dict[str, Any]) -> None:
        path = self.folder / "jobs.jsonl"
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            # A line that a kill cut short must not take this one with it.
            start = b"\n" if size and file.read(1) != b"\n" else b""
            file.write(start + json.dumps(line | {"time": time.time()}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _stage(data: dict[str, Any]) -> Stage:
    fields = data | {
        "needs": tuple(data["needs"]),
        "after": tuple(data["after"]),
        "resources": Needs(**data["resources"]),
    }
    return Stage(**fields)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # cut short by a kill
            continue
    return lines


def job_groups(folder: Path) -> list[JobGroup]:
    """What was submitted so far of the submission in ``folder``, the latest last."""
    groups: dict[str, JobGroup] = {}
    for line in _lines(folder / "jobs.jsonl"):
        known = groups.get(line["comment"])
        stages = line.get("stages") or (known.stages if known else ())
        groups[line["comment"]] = JobGroup(
            line["comment"], tuple(stages), line.get("job"), line["time"]
        )
    return list(groups.values())


def new_folder(submissions: Path, title: str) -> Path:
    """A new folder for a submission; its name says what and when."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = submissions / f"{title}-{stamp}-{secrets.token_hex(2)}"
    guarded_folder(folder)
    return folder


def list_submissions(submissions: Path) -> list[Path]:
    """The folders of all submissions, the oldest first."""
    found = [path.parent for path in submissions.glob("*/submission.json")]
    return sorted(found, key=lambda folder: ((folder / "submission.json").stat().st_mtime, folder))
