"""Identifies processes across machines, and whether they are still running."""

import os
import socket
from pathlib import Path
from typing import Self

import psutil
from pydantic import Field

from g2rpo.config import StrictModel


def process_start(pid: int) -> float | None:
    """When process ``pid`` of this machine started; None if there is no such process.

    On Linux in clock ticks since boot, which do not depend on the wall clock; elsewhere in seconds
    since 1970. Zombies do not count as processes.
    """
    try:
        # The name in parentheses may contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    except (OSError, IndexError, ValueError):
        pass
    try:
        process = psutil.Process(pid)
        ended = process.status() == psutil.STATUS_ZOMBIE
        return None if ended else float(process.create_time())
    except psutil.Error:
        return None


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def slurm_job_id() -> str | None:
    """The id of this process's SLURM job, or None.

    For job arrays ``<array id>_<index>``, as in SLURM's own tools.
    """
    array, index = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID") or None


class Owner(StrictModel):
    """A process, unique across machines that share a file system."""

    host: str
    pid: int = Field(gt=0)
    process_start: float | None
    """See :func:`process_start`; process ids are reused."""
    boot: str | None
    """Id of the machine's current boot, if readable."""
    pid_namespace: str | None
    """The namespace of ``pid`` (containers have their own)."""
    slurm_cluster: str | None = None
    slurm_job: str | None = None
    slurm_restarts: int = 0
    """How often SLURM has requeued the job."""

    @classmethod
    def this_process(cls) -> Self:
        """The current process."""
        restarts = os.environ.get("SLURM_RESTART_COUNT", "")
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()),
            boot=_boot(),
            pid_namespace=_pid_namespace(),
            slurm_cluster=os.environ.get("SLURM_CLUSTER_NAME") or None,
            slurm_job=slurm_job_id(),
            slurm_restarts=int(restarts) if restarts.isdecimal() else 0,
        )

    def is_gone(self) -> bool:
        """Whether the process has certainly ended; False if it is not visible from here."""
        here = (socket.gethostname(), _boot(), _pid_namespace())
        if (self.host, self.boot, self.pid_namespace) != here:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's process
            return False
        start = process_start(self.pid)
        return start is None or (self.process_start is not None and start != self.process_start)

    def precedes(self, other: "Owner") -> bool:
        """Whether ``other`` is the same SLURM job after a requeue."""
        job = (self.slurm_cluster, self.slurm_job)
        return (
            self.slurm_job is not None
            and job == (other.slurm_cluster, other.slurm_job)
            and self.slurm_restarts < other.slurm_restarts
        )

    @property
    def how_to_end(self) -> str:
        """The command that stops the process."""
        if self.slurm_job is not None:
            return f"scancel {self.slurm_job}"
        return f"kill {self.pid} on {self.host}"

    def __str__(self) -> str:
        job = "" if self.slurm_job is None else f", SLURM job {self.slurm_job}"
        return f"{self.host}, pid {self.pid}{job}"
