"""What SLURM says about jobs: squeue for those that live, sacct for those that ended."""

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
"""Seconds that SLURM has to answer a question."""

REASONS = {
    "Resources": "waiting for free devices",
    "Priority": "waiting behind jobs of higher priority",
    "Dependency": "waiting for the stages that it needs",
    "DependencyNeverSatisfied": "a stage that it needs has failed",
    "BeginTime": "starts again in a moment: it was requeued",
    "JobHeldUser": "held: release it with `scontrol release`",
    "JobHeldAdmin": "held by an administrator",
    "job_requeued_in_held_state": "held after it was requeued: `scontrol release` it",
    "launch_failed_requeued_held": "held: its node failed to start it; `scontrol release` it",
    "PartitionTimeLimit": "its time limit is above the partition's: lower `minutes`",
    "PartitionNodeLimit": "it wants more nodes than the partition has",
    "PartitionConfig": "it wants more than the partition allows",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is inactive",
    "ReqNodeNotAvail": "a node that it needs is down or reserved",
    "NodeDown": "a node that it needs is down",
    "BadConstraints": "no node fits its constraint",
    "InvalidAccount": "its account is not valid: set `account`",
    "InvalidQOS": "its qos is not valid: set `qos`",
    "QOSMaxJobsPerUserLimit": "as many of your jobs run as the qos allows",
    "QOSMaxGRESPerUser": "you use as many GPUs as the qos allows",
    "QOSGrpGRES": "the qos has used up its GPUs",
    "AssocGrpGRES": "your account has used up its GPUs",
    "AssocMaxJobsLimit": "as many jobs run as your account allows",
    "AssocGrpCPUMinutesLimit": "your account has used up its time",
    "AssocGrpGRESMinutes": "your account has used up its GPU time",
    "JobArrayTaskLimit": "waiting for other jobs of its array (array_parallelism)",
}
ENDED = {
    "COMPLETED": "ended",
    "FAILED": "failed",
    "CANCELLED": "cancelled",
    "TIMEOUT": "ran into its time limit before it could save and be requeued",
    "PREEMPTED": "preempted and not requeued",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "out of main memory: raise memory_gb_per_task",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "ended at its deadline",
    "REVOKED": "revoked",
}


@dataclass(frozen=True)
class JobState:
    """One job or array task.

    Attributes:
        job: its id, with the array index where it has one.
        state: SLURM's word, e.g. ``PENDING``.
        reason: SLURM's word for why it waits, or its exit code; may be empty.
        node: where it runs or ran; empty while it waits.
        comment: of its submission; empty where accounting keeps none.
    """

    job: str
    state: str
    reason: str = ""
    node: str = ""
    comment: str = ""

    @property
    def active(self) -> bool:
        """Whether it waits, runs, or will run again."""
        return self.state in ACTIVE

    @property
    def words(self) -> str:
        """Why it is not running, in plain words; empty while it runs."""
        if self.state == "PENDING":
            # squeue writes some with spaces, scontrol all with underscores.
            known = self.reason.replace(" ", "_")
            return REASONS.get(known, self.reason or "waiting")
        if self.active:
            return ""
        return ENDED.get(self.state, self.state.lower())


def ask(*command: str, text: str = "", seconds: float | None = None, both: bool = False) -> str:
    """What a command of SLURM prints.

    Args:
        command: the command.
        text: its standard input.
        seconds: how long it may take; :data:`TIMEOUT` by default.
        both: whether standard error counts too: ``sbatch --test-only`` answers there.

    Raises:
        UserError: it is missing, fails, or does not answer in time.
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
            # The indices of a long array are printed whole.
            env=os.environ | {"SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0"},
        )
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} was not found: run this where SLURM's commands are"
        ) from None
    except OSError as error:
        raise UserError(f"{command[0]} cannot be run: {error.strerror or error}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {seconds:g} s") from None
    if done.returncode:
        told = error_of(done.stderr) or f"exit code {done.returncode}"
        raise UserError(f"{command[0]} failed: {told}")
    return done.stdout + done.stderr if both else done.stdout


def error_of(text: str) -> str:
    """The error in what a command wrote, without what the site has it say before."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    first = next((number for number, line in enumerate(lines) if "error" in line), 0)
    return " ".join(lines[first:])[:300]


def _elements(job: str) -> list[str]:
    """The jobs that an id stands for: several where it has a range, as in ``21_[0,2-8:2%4]``."""
    found = _RANGE.fullmatch(job)
    if found is None:
        return [job]
    array, ranges = found.groups()
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
    """This user's jobs that wait or run, or ended lately, by id; every task of an array alone.

    Raises:
        UserError: squeue is missing or does not answer.
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
    """How jobs ended, by id: as accounting says, else squeue, as far as either knows them.

    A task that was cancelled while its array waited is in no list any more: where SLURM knows its
    array, that is what became of it.

    Args:
        jobs: the ids.
        listed: what squeue lists (:func:`known_jobs`).
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
    """The id of a task's array; of a job that is none, its own."""
    return job.partition("_")[0]


def _accounts(ids: set[str]) -> dict[str, JobState]:
    """What accounting says; nothing where there is none, or it does not answer."""
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
        # A line for a range may be older than that of one of its tasks.
        kept = ranges if "[" in name else found
        for job in _elements(name):
            kept[job] = JobState(job, state.split()[0], code, "" if "None" in node else node)
    return ranges | found


def cancel_jobs(jobs: Iterable[str]) -> None:
    """Cancels jobs; those that have ended are left out.

    Raises:
        UserError: scancel is missing or refuses.
    """
    ids = list(jobs)
    if not ids:
        return
    try:
        ask("scancel", *ids)
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
