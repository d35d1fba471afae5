"""What SLURM says about jobs: squeue for those that live, sacct for those that ended."""

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from g2rpo.errors import UserError

ACTIVE = {
    "PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD",
    "REQUEUE_FED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT",
}  # fmt: skip
TIMEOUT = 60

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


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            env=os.environ | {"SLURM_TIME_FORMAT": "standard"},
        )
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} was not found: run this where SLURM's commands are"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {TIMEOUT} s") from None
    if done.returncode:
        told = " ".join(done.stderr.split())
        if "Invalid job id" in told:
            return done.stdout
        raise UserError(f"{command[0]} failed: {told[:300]}")
    return done.stdout


def active_jobs() -> dict[str, JobState]:
    """This user's jobs that wait or run, by id; every task of an array alone.

    Raises:
        UserError: squeue is missing or does not answer.
    """
    fields = "%i|%T|%r|%N|%k"
    output = _ask("squeue", "--me", "--array", "--noheader", f"--format={fields}")
    jobs = {}
    for line in output.splitlines():
        parts = [part.strip() for part in line.split("|", 4)]
        if len(parts) != 5:
            continue
        job, state, reason, node, comment = parts
        reason = reason.strip("()").split(",")[0]
        found = JobState(job, state, "" if reason == "None" else reason, node, comment)
        if found.active:
            jobs[job] = found
    return jobs


def ended_jobs(jobs: Iterable[str]) -> dict[str, JobState]:
    """What accounting says of jobs, by id; nothing where the cluster keeps no accounts."""
    ids = sorted({job.split("_")[0] for job in jobs})
    if not ids:
        return {}
    fields = "JobID,State,ExitCode,NodeList"
    try:
        output = _ask(
            "sacct", "--allocations", "--noheader", "--parsable2", f"--format={fields}",
            f"--jobs={','.join(ids)}",
        )  # fmt: skip
    except UserError:
        return {}
    found = {}
    for line in output.splitlines():
        parts = line.split("|")
        if len(parts) != 4 or not parts[1].strip():
            continue
        job, state, code, node = parts
        found[job] = JobState(job, state.split()[0], code, "" if "None" in node else node)
    return found


def cancel_jobs(jobs: Iterable[str]) -> None:
    """Cancels jobs; those that have ended are passed over.

    Raises:
        UserError: scancel is missing or refuses.
    """
    ids = list(jobs)
    if ids:
        _ask("scancel", *ids)
