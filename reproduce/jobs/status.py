"""Where every stage of a submission stands, from what is on disk and what SLURM says.

Nothing is asked of the process that submitted it, so this works when that is gone.
"""

import functools
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from g2rpo.attempts import Attempt, Record, WorkProgress, is_alive
from g2rpo.checksums import hashing_up_to
from g2rpo.errors import UserError
from reproduce.commands.console import Word
from reproduce.jobs.launch import DRIVER
from reproduce.jobs.plan import not_needed
from reproduce.jobs.stage_jobs import StageJob, stage_jobs, with_ends
from reproduce.stages.work import Inputs, latest_attempt
from slurm import states
from slurm.graph import Stage
from slurm.job import REQUEUE
from slurm.states import JobState
from slurm.submission import Submission

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


def read_status(
    submission: Submission, trouble: Callable[[str], None] | None = None
) -> list[StageStatus]:
    """The state of every stage, in the order of the graph.

    Args:
        submission: the submission; its stages may be done by jobs of another one.
        trouble: called with one line when SLURM does not answer; the states are then those of the
            run folders. None raises the error instead.

    Raises:
        UserError: the submission cannot be read, or SLURM does not answer.
    """
    jobs, reached = _jobs(submission, trouble)
    with hashing_up_to():
        done = _done_stages(submission, Inputs.load(submission.folder))
    reader = _Reader(submission, done, jobs, reached)
    for stage in submission.graph.stages.values():
        reader.found[stage.name] = reader.read(stage)
    return list(reader.found.values())


def _done_stages(submission: Submission, inputs: Inputs) -> set[str]:
    """The stages whose outputs are there, or are not needed any more; without the rendering."""
    stages = submission.graph.stages.values()
    done = {s.name for s in stages if s.kind != "render" and inputs.work(s).done()}
    return done | not_needed(submission.graph, done)


def _jobs(
    submission: Submission, trouble: Callable[[str], None] | None
) -> tuple[dict[str, StageJob], bool]:
    """The job of each stage that has one, and whether SLURM, where it is needed, has answered."""
    if submission.cluster.kind != "slurm":
        return {}, True
    known: Mapping[str, JobState] = {}
    reached = True
    try:
        known = states.known_jobs()
    except UserError as error:
        if trouble is None:
            raise
        trouble(f"SLURM not reachable ({error}); this is what the run folders say")
        reached = False
    found = stage_jobs(submission.folder.parent.parent, known)
    mine = {stage: job for stage, job in found.items() if stage in submission.graph.stages}
    return with_ends(mine, known) if reached else mine, reached


def _lives(attempt: Attempt) -> bool:
    record = attempt.record
    return record is not None and is_alive(attempt)


@dataclass(frozen=True)
class _Reader:
    submission: Submission
    done: Collection[str]
    jobs: Mapping[str, StageJob]
    reached: bool
    found: dict[str, StageStatus] = field(default_factory=dict)

    @functools.cached_property
    def driver_lives(self) -> bool:
        """Whether a process on this machine runs the submission."""
        attempt = latest_attempt(self.submission.folder / DRIVER)
        return attempt is not None and _lives(attempt)

    def read(self, stage: Stage) -> StageStatus:
        """The state of ``stage``; those of the stages that it needs have been read."""
        attempt = latest_attempt(Path(stage.lease))
        job = self.jobs.get(stage.name)
        word, reason = self._judge(stage, attempt, job)
        node = "" if job is None or job.state is None else job.state.node
        if not node and attempt is not None:
            node = "" if attempt.record is None else attempt.record.node
        log = self._log(stage, job)
        if word == "failed" and not self._told_end(attempt) and log is not None:
            reason = _last_error(log) or reason
        return StageStatus(stage, word, reason, "" if job is None else job.job, node, attempt, log)

    def _log(self, stage: Stage, job: StageJob | None) -> Path | None:
        path = self.submission.local_log(stage.name)
        if job is not None:
            owner = replace(
                self.submission, folder=self.submission.folder.with_name(job.submission)
            )
            path = owner.jobs_folder / f"{job.job}_0_log.out"
        return path if path.exists() else None

    def _judge(
        self, stage: Stage, attempt: Attempt | None, job: StageJob | None
    ) -> tuple[Word, str]:
        done = self._is_done(stage, attempt)
        if done or (attempt is not None and _lives(attempt)):
            return ("done" if done else "running"), ""
        state = None if job is None else job.state
        if state is not None and state.active:
            return ("waiting" if state.state == "PENDING" else "starting"), state.words
        ended = self._told_end(attempt)
        if self.reached:
            ended = ended or self._blocked(stage) or _job_end(state)
        if ended is not None:
            return ended
        if not self.reached:
            return "unknown", "SLURM not reachable"
        if self.driver_lives:
            return "waiting", "waiting for the stages that it needs or a free device"
        stopped = "it was stopped" if attempt is not None else "it was not started"
        return "interrupted", "SLURM does not know its job any more" if job else stopped

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

    def _recent(self, record: Record) -> bool:
        return record.updated >= self.submission.created

    def _is_done(self, stage: Stage, attempt: Attempt | None) -> bool:
        if stage.kind == "render":
            record = None if attempt is None else attempt.record
            return record is not None and record.state == "done" and self._recent(record)
        return stage.name in self.done


def _job_end(job: JobState | None) -> tuple[Word, str] | None:
    """What SLURM says of the end of a job."""
    if job is None:
        return None
    if job.state == "CANCELLED":
        return "cancelled", "its job was cancelled"
    if job.state == "COMPLETED":
        return "failed", "its job ended but its outputs are not there"
    if job.state == "FAILED" and job.reason.startswith(f"{REQUEUE}:"):
        return "interrupted", "it was stopped in time, and SLURM did not requeue its job"
    code = f" (exit code {job.reason})" if job.state == "FAILED" and ":" in job.reason else ""
    return "failed", job.words + code


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
            statuses = read_status(submission, show.trouble)
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
