"""The attempts at a piece of work: one small file each, in a folder shared between machines.

The files are numbered from 1 without gaps. The file system must provide exclusive creation (of
several processes that create the same file, one succeeds) and atomic renames.
"""

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar

import pydantic
from pydantic import Field, model_validator

from g2rpo.config import StrictModel, parse_overrides, validate
from g2rpo.owner import Owner
from g2rpo.progress import WorkProgress

ENVIRONMENT = "G2RPO_LEASE_"
"""Prefix of the environment variables that override settings."""
State = Literal["running", "done", "failed", "stopped"]
Result = TypeVar("Result")

_NAME = re.compile(r"(\d{6,})\.json")
_RETRY_SECONDS = (0.1, 0.5, 1.0)


class LeaseSettings(StrictModel):
    """Heartbeats and time limits of leases."""

    heartbeat_seconds: float = Field(15.0, gt=0)
    """Interval at which an owner rewrites its file."""
    stale_seconds: float = Field(300.0, gt=0)
    """An owner without a heartbeat for this long is considered dead. NFS clients may see changes a
    minute late."""
    wait_seconds: float = Field(1800.0, ge=0)
    """How long to wait for a live owner."""

    @model_validator(mode="after")
    def _heard_in_time(self) -> Self:
        if self.stale_seconds <= self.heartbeat_seconds:
            raise ValueError(
                f"stale_seconds {self.stale_seconds:g} must be greater than heartbeat_seconds "
                f"{self.heartbeat_seconds:g}"
            )
        return self

    def resolved(self) -> "LeaseSettings":
        """These settings, overridden by ``G2RPO_LEASE_HEARTBEAT_SECONDS`` and so on.

        Raises:
            UserError: a variable has an invalid value.
        """
        variables = {name: os.environ.get(ENVIRONMENT + name.upper()) for name in self.model_dump()}
        named = parse_overrides(f"{name}={text}" for name, text in variables.items() if text)
        return validate(LeaseSettings, self.model_dump() | named, f"{ENVIRONMENT}*")


class Record(StrictModel):
    """The content of an attempt's file. Times are UTC seconds by the owner's clock."""

    attempt: int
    owner: Owner
    state: State
    reason: str = ""
    """Why it failed or stopped, in one line."""
    progress: WorkProgress = WorkProgress()
    started: float
    updated: float
    node: str
    """The machine's SLURM node name, else its host name."""
    log: str | None = None
    """The owner's log file, if known."""


@dataclass(frozen=True)
class Attempt:
    """An attempt, as read from its file.

    Attributes:
        number: counted from 1; the highest is the owner.
        path: its file.
        record: the file's content; None if it is empty or damaged (its writer was killed).
        age: seconds since it was last written, by the file server's clock.
        written: changes with every write.
    """

    number: int
    path: Path
    record: Record | None
    age: float
    written: tuple[int, int, bytes]

    @property
    def state(self) -> str:
        """The state; ``unknown`` if the file is damaged."""
        return "unknown" if self.record is None else self.record.state

    def __str__(self) -> str:
        if self.record is None:
            return f"attempt {self.number} (unreadable file)"
        return f"attempt {self.number} ({self.record.owner})"


def one_line(text: str) -> str:
    """``text`` without line breaks."""
    return " ".join(text.split())


def patiently(operation: Callable[[], Result]) -> Result:
    """Runs ``operation``, and retries it on transient file system errors.

    Raises:
        OSError: it still fails, or a file or folder does not exist.
    """
    for seconds in _RETRY_SECONDS:
        try:
            return operation()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(seconds)
    return operation()


def attempt_path(directory: Path, number: int) -> Path:
    """The file of an attempt."""
    return directory / f"{number:06d}.json"


def newest_number(directory: Path) -> int:
    """The highest number; 0 if there is none.

    Raises:
        OSError: the folder cannot be listed.
    """
    paths = patiently(lambda: list(directory.iterdir()))
    found = (_NAME.fullmatch(path.name) for path in paths)
    number = max((int(match.group(1)) for match in found if match), default=0)
    # A listing may miss a name that is being replaced; a look-up by name does not.
    while patiently(attempt_path(directory, number + 1).exists):
        number += 1
    return number


def file_server_time(directory: Path) -> float:
    """The file server's time in ``directory``, in seconds since 1970.

    Raises:
        OSError: the folder is not writable.
    """
    descriptor, name = tempfile.mkstemp(dir=directory, prefix=".clock.", suffix=".tmp")
    try:
        os.write(descriptor, b"\n")
        os.fsync(descriptor)
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)


def create_file(path: Path, data: bytes) -> bool:
    """Creates ``path``; returns False if it exists.

    Raises:
        OSError: it cannot be written; it then does not exist.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return True


def replace_file(path: Path, data: bytes) -> None:
    """Replaces ``path`` atomically, ignoring publication guards: it is the owner's own file.

    Raises:
        OSError: it cannot be written; the old content is kept.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        if create_file(temporary, data):
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_attempt(directory: Path, number: int, now: float) -> Attempt | None:
    """One attempt, its age at ``now`` (:func:`file_server_time`); None if it does not exist.

    Raises:
        OSError: it exists but cannot be read.
    """
    path = attempt_path(directory, number)

    def read() -> tuple[bytes, os.stat_result]:
        # Opening a file makes an NFS client revalidate it.
        with path.open("rb") as file:
            return file.read(), os.fstat(file.fileno())

    try:
        data, status = patiently(read)
    except FileNotFoundError:
        return None
    record = None
    with contextlib.suppress(pydantic.ValidationError):
        record = Record.model_validate_json(data)
    written = (status.st_mtime_ns, status.st_ino, data)
    return Attempt(number, path, record, max(0.0, now - status.st_mtime), written)


def read_attempts(folder: Path, name: str) -> list[Attempt]:
    """The attempts at ``name``; the last is the owner's.

    Raises:
        OSError: the folder cannot be read.
    """
    directory = folder / name
    if not directory.exists():
        return []
    newest = newest_number(directory)
    try:
        now = file_server_time(directory)
    except OSError:  # a reader without write permission
        now = time.time()
    found = (read_attempt(directory, number, now) for number in range(1, newest + 1))
    return [attempt for attempt in found if attempt is not None]


def latest(folder: Path, name: str) -> Attempt | None:
    """The latest attempt at ``name``, or None; raises like :func:`read_attempts`."""
    return next(reversed(read_attempts(folder, name)), None)


def is_alive(attempt: Attempt) -> bool:
    """Whether the attempt's process appears to be running."""
    if attempt.age >= LeaseSettings().resolved().stale_seconds:
        return False
    record = attempt.record
    return record is None or (record.state == "running" and not record.owner.is_gone())
