"""The attempts at a piece of work: one small file each, in a folder that several machines share.

The files are numbered from 1 without a gap. Only two things are asked of the file system: that of
several processes which create the same file one succeeds, and that a rename is not seen half done.
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
"""Before the name of a setting in capitals: the variable that overrides it."""
State = Literal["running", "done", "failed", "stopped"]
Result = TypeVar("Result")

_NAME = re.compile(r"(\d{6,})\.json")
_RETRY_SECONDS = (0.1, 0.5, 1.0)


class LeaseSettings(StrictModel):
    """How owners show that they are alive, and how long others believe and wait for them."""

    heartbeat_seconds: float = Field(15.0, gt=0)
    """The owner writes its file anew so often."""
    stale_seconds: float = Field(300.0, gt=0)
    """An owner that has not for so long is given up. Clients of NFS may see a change a minute
    late."""
    wait_seconds: float = Field(1800.0, ge=0)
    """How long to wait for an owner that is alive."""

    @model_validator(mode="after")
    def _heard_in_time(self) -> Self:
        if self.stale_seconds <= self.heartbeat_seconds:
            raise ValueError(
                f"stale_seconds {self.stale_seconds:g} must be more than heartbeat_seconds "
                f"{self.heartbeat_seconds:g}, or owners are given up between two heartbeats"
            )
        return self

    def resolved(self) -> "LeaseSettings":
        """These settings under the environment's ``G2RPO_LEASE_HEARTBEAT_SECONDS`` and so on.

        Raises:
            UserError: a variable is not a number that goes with the others.
        """
        variables = {name: os.environ.get(ENVIRONMENT + name.upper()) for name in self.model_dump()}
        named = parse_overrides(f"{name}={text}" for name, text in variables.items() if text)
        return validate(LeaseSettings, self.model_dump() | named, f"{ENVIRONMENT}*")


class Record(StrictModel):
    """What an attempt's file holds. Times are UTC seconds by the clock of the owner's machine."""

    attempt: int
    owner: Owner
    state: State
    reason: str = ""
    """Why it failed or stopped, in one line."""
    progress: WorkProgress = WorkProgress()
    started: float
    updated: float
    node: str
    """The machine's name in SLURM, else its own."""
    log: str | None = None
    """Where the owner's output goes, where it said so."""


@dataclass(frozen=True)
class Attempt:
    """An attempt as its file shows it.

    Attributes:
        number: counted from 1; the owner is the highest.
        path: its file.
        record: what the file holds; None where it is empty or damaged (its writer was killed).
        age: seconds since it was last written, both times by the file server's clock.
        written: changes whenever the file is written.
    """

    number: int
    path: Path
    record: Record | None
    age: float
    written: tuple[int, int, bytes]

    @property
    def state(self) -> str:
        """The state; ``unknown`` where the file cannot be read."""
        return "unknown" if self.record is None else self.record.state

    def __str__(self) -> str:
        if self.record is None:
            return f"attempt {self.number} (its file says nothing)"
        return f"attempt {self.number} ({self.record.owner})"


def one_line(text: str) -> str:
    """``text`` without line breaks."""
    return " ".join(text.split())


def patiently(operation: Callable[[], Result]) -> Result:
    """Does ``operation`` again where a file system fails for a moment.

    Raises:
        OSError: it fails still, or a file or folder is not there.
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
    """The highest number; 0 where there is none.

    Raises:
        OSError: the folder cannot be listed.
    """
    paths = patiently(lambda: list(directory.iterdir()))
    found = (_NAME.fullmatch(path.name) for path in paths)
    number = max((int(match.group(1)) for match in found if match), default=0)
    # A listing may lack a name that is being renamed over; asking for the name itself does not.
    while patiently(attempt_path(directory, number + 1).exists):
        number += 1
    return number


def file_server_time(directory: Path) -> float:
    """Seconds since 1970 by the clock that the files in ``directory`` are dated with.

    Raises:
        OSError: nothing can be written there.
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
    """Creates ``path``; false where it is there already.

    Raises:
        OSError: it cannot be written; then it is not there.
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
    """Writes ``path`` anew, whatever the guards of :mod:`g2rpo.files` say: it is the owner's own.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        if create_file(temporary, data):
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_attempt(directory: Path, number: int, now: float) -> Attempt | None:
    """One attempt, its age at ``now`` (see :func:`file_server_time`); None where it is not there.

    Raises:
        OSError: it is there and cannot be read.
    """
    path = attempt_path(directory, number)

    def read() -> tuple[bytes, os.stat_result]:
        # Opening a file is what makes a client of NFS ask the server for its newest state.
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


def read_attempts(folder: Path, name: str, first: int = 1) -> list[Attempt]:
    """The attempts at ``name`` from number ``first`` on, the owner's last.

    Raises:
        OSError: the folder cannot be read.
    """
    directory = folder / name
    if not directory.exists():
        return []
    newest = newest_number(directory)
    try:
        now = file_server_time(directory)
    except OSError:  # a reader who may not write there
        now = time.time()
    found = (read_attempt(directory, number, now) for number in range(first, newest + 1))
    return [attempt for attempt in found if attempt is not None]


def latest(folder: Path, name: str) -> Attempt | None:
    """The newest attempt at ``name``, or None.

    Raises:
        OSError: the folder cannot be read.
    """
    directory = folder / name
    found = read_attempts(folder, name, newest_number(directory)) if directory.exists() else []
    return found[-1] if found else None


def is_alive(attempt: Attempt, settings: LeaseSettings | None = None) -> bool:
    """Whether somebody is still at it, as far as can be told from here."""
    settings = (settings or LeaseSettings()).resolved()
    if attempt.age >= settings.stale_seconds:
        return False
    record = attempt.record
    return record is None or (record.state == "running" and not record.owner.is_gone())
