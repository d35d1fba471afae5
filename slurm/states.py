"""Job states from SLURM: squeue for live jobs, sacct for ended ones."""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from g2rpo.errors import UserError

ACTIVE = {
    "PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD",
    "REQUEUE_FED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT",
}  # fmt: skip
TIMEOUT = 60
"""Time limit of SLURM commands, in seconds."""

REASONS = {
    "Resources": "waiting for free nodes or GPUs",
    "Priority": "waiting behind jobs of higher priority",
    "Dependency": "waiting for the stages it depends on",
    "DependencyNeverSatisfied": "a stage it depends on has failed",
    "BeginTime": "requeued, restarts shortly",
    "JobHeldUser": "held; release it with `scontrol release`",
    "JobHeldAdmin": "held by an administrator",
    "job_requeued_in_held_state": "requeued and held; release it with `scontrol release`",
    "launch_failed_requeued_held": "held: failed to launch; release it with `scontrol release`",
    "PartitionTimeLimit": "its time limit exceeds the partition's; lower `minutes`",
    "ReqNodeNotAvail": "a node it needs is down or reserved",
    "BadConstraints": "no node satisfies its constraint",
    "InvalidAccount": "invalid account; set `account`",
    "InvalidQOS": "invalid qos; set `qos`",
    "QOSMaxWallDurationPerJobLimit": "its time limit exceeds the qos's; lower `minutes`",
    "JobArrayTaskLimit": "waiting for other tasks of its array (array_parallelism)",
}
"""SLURM's reasons in plain English, where that adds something."""
ENDED = {
    "COMPLETED": "ended",
    "TIMEOUT": "timed out before it could save and be requeued",
    "PREEMPTED": "preempted and not requeued",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "out of memory; raise memory_gb_per_task",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "ended at its deadline",
}


@dataclass(frozen=True)
class JobState:
    """One job or array task.

    Attributes:
        job: its id, with the array index where it has one.
        state: SLURM's state, e.g. ``PENDING``.
        reason: SLURM's reason for a pending job, or an exit code; may be empty.
        node: where it runs or ran; empty while pending.
        comment: the job's comment; empty if read from accounting.
    """

    job: str
    state: str
    reason: str = ""
    node: str = ""
    comment: str = ""

    @property
    def active(self) -> bool:
        """Whether it is pending, running, or will run again."""
        return self.state in ACTIVE

    @property
    def words(self) -> str:
        """Why it is not running, in plain English; empty while it runs."""
        if self.state == "PENDING":
            # squeue writes some reasons with spaces.
            return REASONS.get(self.reason.replace(" ", "_"), self.reason or "waiting")
        if self.active:
            return ""
        return ENDED.get(self.state, self.state.lower())


def ask(*command: str, text: str = "", seconds: float | None = None, both: bool = False) -> str:
    """Runs a SLURM command and returns its output.

    Args:
        command: the command.
        text: its standard input.
        seconds: its time limit; :data:`TIMEOUT` by default.
        both: return standard error as well: ``sbatch --test-only`` answers there.

    Raises:
        UserError: the command is missing, fails, or times out.
    """
    seconds = TIMEOUT if seconds is None else seconds
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            # SLURM_BITSTR_LEN=0: never abbreviate the indices of a long array.
            env=os.environ | {"SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0"},
        )
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} not found; run this on a machine with SLURM's commands"
        ) from None
    except OSError as error:
        raise UserError(f"{command[0]} cannot be run: {error.strerror or error}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {seconds:g} s") from None
    if done.returncode:
        message = error_of(done.stderr) or f"exit code {done.returncode}"
        raise UserError(f"{command[0]} failed: {message}")
    return done.stdout + done.stderr if both else done.stdout


def error_of(text: str) -> str:
    """The error message in a command's output, without a site's notices before it."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    first = next((number for number, line in enumerate(lines) if "error" in line), 0)
    return " ".join(lines[first:])[:300]


def _elements(job: str) -> list[str]:
    """The jobs of an id, which may hold ranges of array tasks, as in ``21_[0,2-8:2%4]``."""
    match = _RANGE.fullmatch(job)
    if match is None:
        return [job]
    array, ranges = match.groups()
    jobs = []
    for one in ranges.split(","):
        numbers = _INDICES.fullmatch(one)
        if numbers is not None:
            first, last, step = (int(number or 0) for number in numbers.groups())
            indices = range(first, max(first, last) + 1, max(1, step))
            jobs += [f"{array}_{index}" for index in indices]
    return jobs


_RANGE = re.compile(r"(\d+)_\[([^]%]*)(?:%\d+)?\]")
_INDICES = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


def known_jobs() -> dict[str, JobState]:
    """This user's pending, running and recently ended jobs, by id; array tasks individually.

    Raises:
        UserError: squeue is missing, fails, or times out.
    """
    fields = "%i|%T|%r|%N|%k"
    output = ask(
        "squeue", "--me", "--array", "--states=all", "--noheader", f"--format={fields}"
    )  # fmt: skip
    jobs = {}
    for line in output.splitlines():
        parts = [part.strip() for part in line.split("|", 4)]
        if len(parts) != 5:
            continue
        name, state, reason, node, comment = parts
        reason = reason.strip("()").split(",")[0]
        for job in _elements(name):
            jobs[job] = JobState(job, state, "" if reason == "None" else reason, node, comment)
    return jobs


def ended_jobs(jobs: Iterable[str], listed: Mapping[str, JobState]) -> dict[str, JobState]:
    """How jobs ended, by id: from accounting, else from squeue; unknown jobs are absent.

    SLURM drops a task that was cancelled while its array was pending from every list: if it still
    knows the array, a missing task counts as cancelled.

    Args:
        jobs: the ids.
        listed: the jobs that squeue lists (:func:`known_jobs`).
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    accounts = _accounts({array_of(job) for job in wanted})
    arrays = {array_of(job) for job in (*accounts, *listed)}
    found = {}
    for job in wanted:
        state = accounts.get(job)
        if state is not None and not state.active:
            found[job] = state
        elif job in listed:
            found[job] = listed[job]
        elif "_" in job and array_of(job) in arrays and (not state or state.state == "PENDING"):
            found[job] = JobState(job, "CANCELLED")
    return found


def array_of(job: str) -> str:
    """The id of a task's array; for other jobs, their own id."""
    return job.partition("_")[0]


def _accounts(ids: set[str]) -> dict[str, JobState]:
    """Job states from accounting; empty if accounting is disabled or does not answer."""
    fields = "JobID,State,ExitCode,NodeList"
    try:
        output = ask(
            "sacct", "--allocations", "--noheader", "--parsable2", f"--format={fields}",
            f"--jobs={','.join(sorted(ids))}",
        )  # fmt: skip
    except UserError:
        return {}
    ranges: dict[str, JobState] = {}
    found: dict[str, JobState] = {}
    for line in output.splitlines():
        parts = line.split("|")
        if len(parts) != 4 or not parts[1].strip():
            continue
        name, state, code, node = parts
        # A task's own line may be newer than the line of its range.
        kept = ranges if "[" in name else found
        for job in _elements(name):
            kept[job] = JobState(job, state.split()[0], code, "" if "None" in node else node)
    return ranges | found


def cancel_jobs(jobs: Iterable[str]) -> None:
    """Cancels jobs; those that have already ended are skipped.

    Raises:
        UserError: scancel is missing or fails.
    """
    ids = list(jobs)
    if not ids:
        return
    try:
        ask("scancel", *ids)
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
