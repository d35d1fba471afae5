"""Where every stage of a submission stands, from what is on disk and what SLURM says.

Nothing is asked of the process that submitted it, so this works when that is gone.
"""

import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from g2rpo.attempts import Attempt, Record, WorkProgress
from g2rpo.checksums import hashing_up_to
from g2rpo.errors import UserError
from g2rpo.lease import is_alive
from reproduce.console import Word
from reproduce.launch import DRIVER
from reproduce.plan import not_needed
from reproduce.work import Inputs, latest_attempt
from slurm import states
from slurm.graph import Stage
from slurm.states import JobState
from slurm.submission import Submission, job_groups

OVER: tuple[Word, ...] = ("done", "failed", "cancelled", "interrupted")


@dataclass(frozen=True)
class StageStatus:
    """One stage.

    Attributes:
        stage: the stage.
        word: its state.
        reason: why it waits or failed, in plain words; may be empty.
        job: its SLURM job, or empty.
        node: where it runs or ran.
        attempt: its latest start, or None.
        log: the file that its output goes to, where there is one.
    """

    stage: Stage
    word: Word
    reason: str = ""
    job: str = ""
    node: str = ""
    attempt: Attempt | None = None
    log: Path | None = None

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return 0 if self.attempt is None else self.attempt.number - 1

    @property
    def started(self) -> float:
        """When its latest start was, in seconds since the epoch; 0 where it has not started."""
        record = None if self.attempt is None else self.attempt.record
        return 0.0 if record is None else record.started

    @property
    def progress(self) -> WorkProgress:
        """What it says of itself; empty before it started."""
        record = None if self.attempt is None else self.attempt.record
        return WorkProgress() if record is None else record.progress

    @property
    def share_done(self) -> float | None:
        """How much of it is done, 0..1, while that is known."""
        if self.word == "done":
            return 1.0
        progress = self.progress
        if progress.done is None or not progress.total:
            return None
        return min(1.0, progress.done / progress.total)

    @property
    def remaining(self) -> float | None:
        """Seconds until it is done, as its own progress says."""
        return self.progress.remaining_seconds if self.word == "running" else None


def read_status(submission: Submission) -> list[StageStatus]:
    """The state of every stage, in the order of the graph.

    Raises:
        UserError: the submission cannot be read, or SLURM does not answer.
    """
    jobs = {
        stage: job
        for group in job_groups(submission.folder)
        for stage in group.stages
        if (job := group.job_of(stage)) is not None
    }
    known = _job_states(submission, jobs)
    alive = _driver_lives(submission)
    inputs = Inputs.load(submission.folder)
    with hashing_up_to():
        done = _done_stages(submission, inputs)
    found: dict[str, StageStatus] = {}
    for stage in submission.graph.stages.values():
        job = jobs.get(stage.name)
        reader = _Reader(submission, done, found, driver_lives=alive)
        found[stage.name] = reader.read(stage, None if job is None else known.get(job), job or "")
    return list(found.values())


def _done_stages(submission: Submission, inputs: Inputs) -> set[str]:
    """The stages whose outputs are there, or are not needed any more; without the rendering."""
    stages = submission.graph.stages.values()
    done = {s.name for s in stages if s.kind != "render" and inputs.work(s).done()}
    return done | not_needed(submission.graph, done)


def _job_states(submission: Submission, jobs: Mapping[str, str]) -> dict[str, JobState]:
    if submission.cluster.kind != "slurm" or not jobs:
        return {}
    comments = {group.comment for group in job_groups(submission.folder)}
    active = {
        job: state for job, state in states.active_jobs().items() if state.comment in comments
    }
    ended = states.ended_jobs(job for job in jobs.values() if job not in active)
    return {job: state for job, state in ended.items() if not state.active} | active


def _driver_lives(submission: Submission) -> bool:
    attempt = latest_attempt(submission.folder / DRIVER)
    return attempt is not None and _lives(attempt)


def _lives(attempt: Attempt) -> bool:
    record = attempt.record
    return record is not None and is_alive(attempt)


@dataclass(frozen=True)
class _Reader:
    submission: Submission
    done: Collection[str]
    found: Mapping[str, StageStatus]
    driver_lives: bool

    def read(self, stage: Stage, job_state: JobState | None, job: str) -> StageStatus:
        attempt = latest_attempt(Path(stage.lease))
        word, reason = self._judge(stage, attempt, job_state, submitted=bool(job))
        node = job_state.node if job_state is not None else ""
        if not node and attempt is not None:
            node = "" if attempt.record is None else attempt.record.node
        log = self._log(stage, job)
        if word == "failed" and not self._told_end(attempt) and log is not None:
            reason = _last_error(log) or reason
        return StageStatus(stage, word, reason, job, node, attempt, log)

    def _log(self, stage: Stage, job: str) -> Path | None:
        path = self.submission.local_log(stage.name)
        if job:
            path = self.submission.jobs_folder / f"{job}_0_log.out"
        return path if path.exists() else None

    def _judge(
        self, stage: Stage, attempt: Attempt | None, job: JobState | None, *, submitted: bool
    ) -> tuple[Word, str]:
        done = self._is_done(stage, attempt)
        if done or (attempt is not None and _lives(attempt)):
            return ("done" if done else "running"), ""
        if job is not None and job.active:
            return ("waiting" if job.state == "PENDING" else "starting"), job.words
        ended = self._told_end(attempt) or self._blocked(stage) or self._job_end(job)
        if ended is not None:
            return ended
        if self.driver_lives:
            return "waiting", "waiting for the stages that it needs or a free device"
        stopped = "it was stopped" if attempt is not None else "it was not started"
        return "interrupted", "SLURM does not know its job any more" if submitted else stopped

    def _told_end(self, attempt: Attempt | None) -> tuple[Word, str] | None:
        """What its own record says of its end, where that is of this submission."""
        record = None if attempt is None else attempt.record
        if record is None or record.state != "failed" or not self._recent(record):
            return None
        return "failed", record.reason or "no reason was told"

    def _blocked(self, stage: Stage) -> tuple[Word, str] | None:
        """Whether a stage that it needs will not come."""
        for name in stage.needs:
            other = self.found[name]
            if other.word in ("failed", "cancelled"):
                return "cancelled", f"{other.stage.kind} {other.stage.label} {other.word}"
        return None

    def _job_end(self, job: JobState | None) -> tuple[Word, str] | None:
        """What SLURM says of the end of its job."""
        if job is None:
            return None
        if job.state == "CANCELLED":
            return "cancelled", "its job was cancelled"
        return "failed", _ended(job)

    def _recent(self, record: Record) -> bool:
        return record.updated >= self.submission.created

    def _is_done(self, stage: Stage, attempt: Attempt | None) -> bool:
        if stage.kind == "render":
            record = None if attempt is None else attempt.record
            return record is not None and record.state == "done" and self._recent(record)
        return stage.name in self.done


def _ended(job: JobState) -> str:
    if job.state == "COMPLETED":
        return "its job ended but its outputs are not there"
    code = f" (exit code {job.reason})" if job.state == "FAILED" and job.reason else ""
    return job.words + code


_ERROR = re.compile(r"^(error: .*|[\w.]*(Error|Exception)\b.*)$")


def _last_error(log: Path) -> str | None:
    """The last line of a log that names an error: why a job failed before it could say so."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line for line in reversed(lines[-200:]) if _ERROR.match(line)), None)


def is_over(statuses: Iterable[StageStatus]) -> bool:
    """Whether nothing will happen any more."""
    return all(status.word in OVER for status in statuses)


def follow(submission: Submission, show: "Show", every: float = 10.0) -> list[StageStatus]:
    """Reads the status again and again until nothing will happen any more.

    SLURM may not answer for a while: that is told and waited for, never taken for an end.
    """
    while True:
        try:
            statuses = read_status(submission)
        except UserError as error:
            show.trouble(str(error))
        else:
            show.update(statuses)
            if is_over(statuses):
                return statuses
        time.sleep(every)


class Show:
    """What :func:`follow` tells."""

    def update(self, statuses: list[StageStatus]) -> None:
        """A new reading."""

    def trouble(self, message: str) -> None:
        """A reading that failed."""
