"""The state of every stage of a submission, from its run folders and from SLURM.

It does not depend on the process that submitted it.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from g2rpo.attempts import is_alive
from g2rpo.checksums import hashing_up_to
from g2rpo.errors import UserError
from reproduce.jobs.launch import DRIVER
from reproduce.jobs.plan import not_needed
from reproduce.jobs.stage_jobs import StageJob, stage_jobs, with_ends
from reproduce.runs.state import State, Word, latest_attempt
from reproduce.stages.inputs import Inputs
from reproduce.stages.run import load_stage
from slurm import states
from slurm.graph import Stage
from slurm.job import REQUEUE
from slurm.states import JobState
from slurm.submission import Submission

OVER: tuple[Word, ...] = ("done", "failed", "cancelled", "interrupted")


@dataclass(frozen=True, kw_only=True)
class StageStatus(State):
    """One stage of a submission, with its job, its node and its log file where there is one."""

    stage: Stage
    job: str = ""
    node: str = ""
    log: Path | None = None

    @property
    def restarts(self) -> int:
        """How often it was restarted."""
        return 0 if self.attempt is None else self.attempt.number - 1

    @property
    def started(self) -> float:
        """Its latest start, in seconds since the epoch; 0 if it has not started."""
        return 0.0 if self.record is None else self.record.started

    @property
    def share_done(self) -> float | None:
        """The fraction that is done, 0..1; None if unknown."""
        if self.word == "done":
            return 1.0
        progress = self.progress
        if progress.done is None or not progress.total:
            return None
        return min(1.0, progress.done / progress.total)

    @property
    def remaining(self) -> float | None:
        """Estimated seconds until it is done; None if unknown."""
        return self.progress.remaining_seconds if self.word == "running" else None


def read_status(
    submission: Submission, trouble: Callable[[str], None] | None = None
) -> list[StageStatus]:
    """The state of every stage, in the order of the graph.

    Args:
        submission: the submission; jobs of other submissions may run its stages.
        trouble: called with one line if SLURM does not answer; states then come from the run
            folders alone. None raises the error instead.

    Raises:
        UserError: the submission cannot be read, or SLURM does not answer.
    """
    jobs, reached = _jobs(submission, trouble)
    inputs, stages = Inputs.load(submission.folder), submission.graph.stages
    with hashing_up_to():
        on_disk = {
            name: load_stage(inputs, stage).state(submission.created)
            for name, stage in stages.items()
        }
    done = {name for name, state in on_disk.items() if state.word == "done"}
    for name in not_needed(submission.graph, done):
        on_disk[name] = replace(on_disk[name], word="done", reason="")
    driven = submission.cluster.kind != "slurm" and driver_lives(submission)
    read: dict[str, StageStatus] = {}
    for name, stage in stages.items():
        job = jobs.get(name)
        state = on_disk[name]
        if state.word not in ("done", "running"):
            state = _unfinished(state, job, [read[other] for other in stage.needs], reached, driven)
        read[name] = _status(submission, stage, state, job)
    return list(read.values())


def driver_lives(submission: Submission) -> bool:
    """Whether a process is running the submission on its machine."""
    attempt = latest_attempt(submission.folder / DRIVER)
    return attempt is not None and attempt.record is not None and is_alive(attempt)


def _jobs(
    submission: Submission, trouble: Callable[[str], None] | None
) -> tuple[dict[str, StageJob], bool]:
    """The job of each stage that has one, and whether SLURM answered, if needed."""
    if submission.cluster.kind != "slurm":
        return {}, True
    known: Mapping[str, JobState] = {}
    reached = True
    try:
        known = states.known_jobs()
    except UserError as error:
        if trouble is None:
            raise
        trouble(f"SLURM not reachable ({error}); showing the state of the run folders")
        reached = False
    found = stage_jobs(submission.folder.parent.parent, known)
    mine = {stage: job for stage, job in found.items() if stage in submission.graph.stages}
    return with_ends(mine, known) if reached else mine, reached


def _unfinished(
    state: State, job: StageJob | None, needs: Iterable[StageStatus], reached: bool, driven: bool
) -> State:
    """The state of a stage that is neither done nor running, including its job's.

    Args:
        state: its state in the run folder.
        job: its job.
        needs: the stages that it needs.
        reached: whether SLURM answered, if needed.
        driven: whether a local process runs the stages.
    """
    said = None if job is None else job.state
    lost = next((other for other in needs if other.word in ("failed", "cancelled")), None)
    word, reason = state.word, state.reason
    if said is not None and said.active:
        word, reason = ("waiting" if said.state == "PENDING" else "starting"), said.words
    elif word == "failed":
        pass
    elif not reached:
        word, reason = "unknown", "SLURM not reachable"
    elif lost is not None:
        word, reason = "cancelled", f"{lost.stage} {lost.word}"
    elif said is not None:
        word, reason = _job_end(said)
    elif driven:
        word, reason = "waiting", ""
    else:
        word = "interrupted"
        reason = "SLURM no longer knows its job" if job else reason or "it was stopped"
    return replace(state, word=word, reason=reason)


def _status(
    submission: Submission, stage: Stage, state: State, job: StageJob | None
) -> StageStatus:
    said, record = None if job is None else job.state, state.record
    log = _log(submission, stage, job)
    reason = state.reason
    own = record is not None and record.state == "failed" and record.updated >= submission.created
    if state.word == "failed" and not own and log is not None:
        reason = _last_error(log) or reason
    return StageStatus(
        state.word,
        reason,
        state.attempt,
        stage=stage,
        job="" if job is None else job.job,
        node=(said.node if said is not None else "") or ("" if record is None else record.node),
        log=log,
    )


def _log(submission: Submission, stage: Stage, job: StageJob | None) -> Path | None:
    path = submission.local_log(stage.name)
    if job is not None:
        folder = submission.folder.with_name(job.submission)
        path = folder / submission.jobs_folder.name / f"{job.job}_0_log.out"
    return path if path.exists() else None


def _job_end(job: JobState) -> tuple[Word, str]:
    """The state of a stage whose job has ended."""
    if job.state == "CANCELLED":
        return "cancelled", "its job was cancelled"
    if job.state == "COMPLETED":
        return "failed", "its job completed, but its outputs are missing"
    if job.state == "FAILED" and job.reason.startswith(f"{REQUEUE}:"):
        return "interrupted", "it stopped in time, but SLURM did not requeue its job"
    code = f" (exit code {job.reason})" if job.state == "FAILED" and ":" in job.reason else ""
    return "failed", job.words + code


_ERROR = re.compile(r"^(error: .*|[\w.]*(Error|Exception)\b.*)$")


def _last_error(log: Path) -> str | None:
    """The last error line of a log, for jobs that failed before they could record a reason."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line for line in reversed(lines[-200:]) if _ERROR.match(line)), None)


def is_over(statuses: Iterable[StageStatus]) -> bool:
    """Whether every stage has ended."""
    return all(status.word in OVER for status in statuses)


def readings(
    submission: Submission, trouble: Callable[[str], None], every: float = 10.0
) -> Iterator[list[StageStatus]]:
    """Yields the status repeatedly until every stage has ended.

    While SLURM does not answer, ``trouble`` is called and polling continues.
    """
    while True:
        try:
            statuses = read_status(submission, trouble)
        except UserError as error:
            trouble(str(error))
        else:
            yield statuses
            if is_over(statuses):
                return
        time.sleep(every)
