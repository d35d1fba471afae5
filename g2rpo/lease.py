"""A lease on a piece of work, so that only one process on any machine does it at a time.

The work has a folder with one file per attempt (:mod:`g2rpo.attempts`). The process that creates
the next file owns the work; the number is a fencing token. The owner rewrites its file as a
heartbeat; if it stops doing so, the next number takes over. A process that was only slow, or cut
off from the file server, sees the higher number before it publishes anything, and stops.

A process may still be suspended between that check and the rename that follows. Creation and
rename alone cannot close this gap of microseconds; the files are complete even then.

filelock's ``SoftFileLease`` has no fencing token: a suspended and superseded owner continued for
two heartbeats before it noticed. It also waits a whole ``lease_duration`` for an owner that died on
another machine, and for the SLURM job's own run before a requeue.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from g2rpo.attempts import (
    Attempt,
    LeaseSettings,
    Record,
    State,
    attempt_path,
    create_file,
    file_server_time,
    newest_number,
    one_line,
    read_attempt,
    replace_file,
)
from g2rpo.errors import UserError
from g2rpo.files import publication_guard
from g2rpo.owner import Owner
from g2rpo.progress import ProgressReport, WorkProgress, duration
from g2rpo.stop import Stopped, StopRequest

logger = logging.getLogger(__name__)
REPORT_SECONDS = 60.0
"""How often a waiting process logs what it waits for."""
POLL_SECONDS = 5.0
"""Maximum seconds between two checks."""


class LeaseLost(UserError):  # noqa: N818 - an event, not a fault
    """Another process owns the work; this one may not publish any of it."""


class _Wait:
    """How long we have waited for the owner, and what it has changed since."""

    def __init__(self, work: Path, settings: LeaseSettings) -> None:
        self.work, self.settings = work, settings
        self.started = self._seen_at = time.monotonic()
        self._reported_at = float("-inf")
        self._seen: tuple[int, int, bytes] | None = None

    def reason_to_succeed(self, owner: Attempt) -> str | None:
        """Why the work may be taken over, or None while the owner is alive."""
        if owner.written != self._seen:
            self._seen, self._seen_at = owner.written, time.monotonic()
        record = owner.record
        if record is not None:
            if record.state != "running":
                return record.state
            if record.owner.precedes(Owner.this_process()):
                return "same SLURM job before its requeue"
            if record.owner.is_gone():
                return "process has ended"
        unchanged = time.monotonic() - self._seen_at
        silent = max(owner.age, unchanged)
        settings = self.settings
        # Some file systems date files by the writer's clock. An owner with a slow clock only seems
        # silent: its file still changes.
        watched = min(2 * settings.heartbeat_seconds, settings.stale_seconds)
        watched = min(watched, settings.wait_seconds / 2)
        if silent >= settings.stale_seconds and unchanged >= watched:
            return f"no heartbeat for {duration(silent)}"
        return None

    def pause(self, owner: Attempt) -> None:
        """Waits a little, and logs it from time to time.

        Raises:
            UserError: timed out.
            Stopped: this process was asked to stop.
        """
        StopRequest.obey()
        now = time.monotonic()
        waited = now - self.started
        left = self.settings.wait_seconds - waited
        record = owner.record
        progress = "" if record is None else str(record.progress)
        shown = one_line(
            f"{self.work} is locked by {owner}{f': {progress}' if progress else ''}, "
            f"last heartbeat {duration(owner.age)} ago"
        )
        if left <= 0:
            end = "its process" if record is None else record.owner.how_to_end
            raise UserError(
                f"{shown}; gave up after {duration(waited)}: let it finish or stop it "
                f"({end}), then run the same command again"
            )
        if now - self._reported_at >= REPORT_SECONDS:
            self._reported_at = now
            logger.info("%s; waiting up to %s", shown, duration(left))
        time.sleep(min(POLL_SECONDS, self.settings.heartbeat_seconds, left))


class Lease:
    """The right to do a piece of work, held from :meth:`acquire` to :meth:`release`.

    As a context it guards all publications of this process (:mod:`g2rpo.files`), records its
    progress, and is released at the end: as done, as stopped after :class:`g2rpo.stop.Stopped` or a
    keyboard interrupt, as failed after another exception. All threads are guarded, so a process
    does one piece of work at a time, or nested ones.
    """

    def __init__(self, directory: Path, record: Record, settings: LeaseSettings) -> None:
        """For an attempt whose file has just been created; use :meth:`acquire`."""
        self.directory, self.number = directory, record.attempt
        self._path = attempt_path(directory, record.attempt)
        self._settings, self._record = settings, record
        self._progress = record.progress
        self._file_lock = threading.Lock()
        self._lost: str | None = None
        self._released = threading.Event()
        self._warned = False
        self._context = contextlib.ExitStack()
        beat = self._beat_until_released
        threading.Thread(target=beat, name=f"lease of {directory.name}", daemon=True).start()

    @classmethod
    def acquire(cls, folder: Path, name: str, settings: LeaseSettings | None = None) -> "Lease":
        """Takes the lease; waits while its owner is alive.

        After waiting, check whether the work is still to be done: the owner may have finished it.

        Args:
            folder: on a file system shared by all processes that may do the work.
            name: of the work; a folder in ``folder``, created if needed.
            settings: which the environment overrides.

        Raises:
            UserError: the owner is still alive after ``wait_seconds``, or the folder is not usable.
            Stopped: this process was asked to stop while waiting.
        """
        settings = (settings or LeaseSettings()).resolved()
        work = folder / name
        wait = _Wait(work, settings)
        try:
            work.mkdir(parents=True, exist_ok=True)
            while True:
                number = newest_number(work)
                owner = read_attempt(work, number, file_server_time(work)) if number else None
                reason = "" if owner is None else wait.reason_to_succeed(owner)
                if owner is not None and reason is None:
                    wait.pause(owner)
                    continue
                record = _first_record(number + 1)
                if create_file(attempt_path(work, number + 1), _encoded(record)):
                    if owner is not None:
                        _log_takeover(work, owner, reason or "")
                    return cls(work, record, settings)
        except OSError as error:
            raise UserError(
                f"{work}: cannot create a lease ({error.strerror or error}); check that the folder "
                "is writable"
            ) from None

    def follow(self, progress: WorkProgress) -> None:
        """Sets the progress that the next heartbeat writes."""
        self._progress = progress

    def _beat_until_released(self) -> None:
        while not self._released.wait(self._settings.heartbeat_seconds):
            with self._file_lock:
                if not self._released.is_set():
                    self._beat()

    def _beat(self) -> None:
        try:
            if not self._is_mine():
                return
            self._record = self._refreshed()
            replace_file(self._path, _encoded(self._record))
            self._warned = False
        except OSError as error:
            with contextlib.suppress(OSError):
                os.utime(self._path)  # works on a full disk
                return
            if not self._warned:
                self._warned = True
                logger.warning("%s: cannot write the heartbeat (%s); retrying", self._path, error)

    def _refreshed(self, **changes: Any) -> Record:
        changes = {"progress": self._progress, "updated": time.time()} | changes
        return self._record.model_copy(update=changes)

    def _is_mine(self) -> bool:
        """Whether the file is this attempt's: the folder may have been deleted and recreated.

        Raises:
            OSError: it cannot be read.
        """
        attempt = read_attempt(self.directory, self.number, 0.0)
        if attempt is not None:
            record = attempt.record
            mine = (self._record.owner, self._record.started)
            if record is None or (record.owner, record.started) == mine:
                return True
        self._lost = self._deleted
        return False

    @property
    def _deleted(self) -> str:
        return f"{self._path}: the lease was deleted; this process stops writing"

    def check(self) -> None:
        """Returns if this process owns the work.

        Raises:
            LeaseLost: it no longer does, or the folder cannot be read.
        """
        if self._lost is None:
            try:
                newest = newest_number(self.directory)
                if newest > self.number:
                    successor = read_attempt(self.directory, newest, 0.0)
                    self._lost = (
                        f"{self.directory}: {successor or f'attempt {newest}'} has taken over from "
                        f"attempt {self.number}; this process stops writing"
                    )
                elif newest < self.number:
                    self._lost = self._deleted
            except OSError as error:
                # Not remembered: the next check may succeed.
                raise LeaseLost(
                    f"{self.directory}: cannot be read ({error.strerror or error}), so another "
                    "process may own the work; nothing is written"
                ) from None
        if self._lost is not None:
            raise LeaseLost(self._lost)

    def release(self, state: State, reason: str = "") -> None:
        """Ends the attempt as ``state``. Never raises: failures are logged."""
        if self._released.is_set():
            return
        self._released.set()
        with self._file_lock:
            try:
                if self._lost is None or self._is_mine():
                    self._write_last(_encoded(self._refreshed(state=state, reason=reason)))
            except OSError as error:
                logger.warning("%s: cannot record the state %s (%s)", self._path, state, error)

    def _write_last(self, data: bytes) -> None:
        try:
            replace_file(self._path, data)
        except OSError:
            # On a full disk the file itself may still have room. A partial record is treated like
            # one without heartbeats.
            with self._path.open("rb+") as file:
                file.write(data)
                file.truncate()

    def __enter__(self) -> "Lease":
        self._context.enter_context(publication_guard(self.check))
        earlier = ProgressReport.listener
        ProgressReport.listener = self.follow
        self._context.callback(setattr, ProgressReport, "listener", earlier)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._context.close()
        self.release(*_outcome(error))


def _outcome(error: BaseException | None) -> tuple[State, str]:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "done", ""
    if isinstance(error, Stopped):
        return "stopped", one_line(error.reason)
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "interrupted by the keyboard"
    name, text = type(error).__name__, one_line(str(error))
    if isinstance(error, UserError):
        return "failed", text
    return "failed", f"{name}: {text}" if text else name


def _first_record(number: int) -> Record:
    now = time.time()
    return Record(
        attempt=number,
        owner=Owner.this_process(),
        state="running",
        started=now,
        updated=now,
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
    )


def _encoded(record: Record) -> bytes:
    return record.model_dump_json(indent=2).encode() + b"\n"


def _log_takeover(work: Path, owner: Attempt, reason: str) -> None:
    # Regular ends are routine, interrupted ones are not.
    ended = owner.record is not None and owner.record.state != "running"
    logger.log(
        logging.INFO if ended else logging.WARNING,
        "%s: taking over from %s, last heartbeat %s ago: %s",
        work, owner, duration(owner.age), reason,
    )  # fmt: skip
