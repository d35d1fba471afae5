"""A lease on a piece of work, so that no two processes on any machine do it at once.

The work has a folder with one file per attempt (:mod:`g2rpo.attempts`). Whoever creates the next
file owns the work: its number is a fencing token. The owner shows that it is alive by writing its
file anew; one that does not is succeeded by the next number. A process that was only slow, or cut
off from the file server, finds the higher number before it publishes anything, and stops.

A process can be held up between that look and the rename right after it; creation and rename alone
cannot close this gap of microseconds. The files are whole even then.

Why not filelock's ``SoftFileLease``: it has no fencing token. An owner that was stopped, then
superseded, went on for two heartbeats before it was told; here it publishes nothing. It also waits
the whole ``lease_duration`` for an owner that died yesterday on another machine and for a SLURM
job's own earlier start, and the record that ``status`` reads would still be ours.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
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
TELL_SECONDS = 60.0
"""How often a waiting process says whom it waits for."""
POLL_SECONDS = 5.0
"""How often it looks, at most."""


class LeaseLost(UserError):  # noqa: N818 - it is what has happened
    """Somebody else does the work now; this process may not publish anything of it."""


class _Wait:
    """One process's waiting for the owner: how long, and what it saw of the owner meanwhile."""

    def __init__(self, work: Path, settings: LeaseSettings) -> None:
        self.work, self.settings = work, settings
        self.started = self._seen_at = time.monotonic()
        self._told_at = float("-inf")
        self._seen: tuple[int, int, bytes] | None = None

    def reason_to_succeed(self, owner: Attempt) -> str | None:
        """Why the work may be taken over, or None while the owner has to be waited for."""
        if owner.written != self._seen:
            self._seen, self._seen_at = owner.written, time.monotonic()
        record = owner.record
        if record is not None:
            if record.state != "running":
                return record.state
            if record.owner.precedes(Owner.this_process()):
                return "the same SLURM job before its restart"
            if record.owner.is_gone():
                return "that process has ended"
        unchanged = time.monotonic() - self._seen_at
        silent = max(owner.age, unchanged)
        settings = self.settings
        # Some file systems date files by the writer's clock after all. An owner whose clock is
        # slow only seems silent: its file changes while one looks.
        watched = min(2 * settings.heartbeat_seconds, settings.stale_seconds)
        watched = min(watched, settings.wait_seconds / 2)
        if silent >= settings.stale_seconds and unchanged >= watched:
            return f"no heartbeat for {duration(silent)}"
        return None

    def pause(self, owner: Attempt) -> None:
        """Waits a little, and says so now and then.

        Raises:
            UserError: the time for waiting is over.
            Stopped: this process is to stop.
        """
        StopRequest.obey()
        now = time.monotonic()
        waited = now - self.started
        left = self.settings.wait_seconds - waited
        record = owner.record
        progress = "" if record is None else str(record.progress)
        shown = one_line(
            f"{self.work} is being worked on by {owner}{f': {progress}' if progress else ''}, "
            f"last heartbeat {duration(owner.age)} ago"
        )
        if left <= 0:
            end = "its process" if record is None else record.owner.how_to_end
            raise UserError(
                f"{shown}; waited for {duration(waited)}: let it finish, or end it ({end}), and "
                "run the same command again"
            )
        if now - self._told_at >= TELL_SECONDS:
            self._told_at = now
            logger.info("%s; waiting for it, %s at most", shown, duration(left))
        time.sleep(min(POLL_SECONDS, self.settings.heartbeat_seconds, left))


class Lease:
    """The right to do a piece of work, held from :meth:`acquire` to :meth:`release`.

    As a context it guards all publications of this process (:mod:`g2rpo.files`), carries the
    numbers of its progress reports, and releases itself: as done, as stopped after
    :class:`g2rpo.stop.Stopped` or a keyboard interrupt, as failed after another exception. All
    threads are guarded, so a process does one piece of work at a time, or one inside of another.

    Attributes:
        directory: the folder of the attempts.
        number: this attempt's.
    """

    def __init__(self, directory: Path, record: Record, settings: LeaseSettings) -> None:
        """Of an attempt whose file has just been created; use :meth:`acquire`."""
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
    def acquire(
        cls, folder: Path, name: str, settings: LeaseSettings | None = None, log: Path | None = None
    ) -> "Lease":
        """Takes the lease; waits while its owner is alive.

        Whoever had to wait looks again whether the work is done: the owner may have finished it.

        Args:
            folder: on a file system that all who do the work share.
            name: of the work: a folder inside of ``folder``, made if it is not there.
            settings: how long to wait and for whom; the environment goes before them.
            log: where this process's output goes, for those who look at the attempt.

        Raises:
            UserError: the owner is alive still after ``wait_seconds``, or the folder cannot be
                used.
            Stopped: this process was asked to stop while it waited.
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
                record = _first_record(number + 1, log)
                if create_file(attempt_path(work, number + 1), _encoded(record)):
                    if owner is not None:
                        _tell_succession(work, owner, reason or "")
                    return cls(work, record, settings)
        except OSError as error:
            raise UserError(
                f"{work}: cannot be used to keep others from the same work "
                f"({error.strerror or error}); see that it can be written"
            ) from None

    def follow(self, progress: WorkProgress) -> None:
        """Takes over how far the work is; the next heartbeat writes it."""
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
                os.utime(self._path)  # needs no space where the disk is full
                return
            if not self._warned:
                self._warned = True
                logger.warning("%s: no heartbeat (%s); trying again", self._path, error)

    def _refreshed(self, **changes: Any) -> Record:
        changes = {"progress": self._progress, "updated": time.time()} | changes
        return self._record.model_copy(update=changes)

    def _is_mine(self) -> bool:
        """Whether the file is this attempt's: somebody may have deleted the folder and begun anew.

        Raises:
            OSError: it cannot be read.
        """
        found = read_attempt(self.directory, self.number, 0.0)
        if found is not None:
            record = found.record
            mine = (self._record.owner, self._record.started)
            if record is None or (record.owner, record.started) == mine:
                return True
        self._lost = self._deleted
        return False

    @property
    def _deleted(self) -> str:
        return f"{self._path}: this process's file was deleted; it writes nothing more"

    def check(self) -> None:
        """Returns while this process owns the work.

        Raises:
            LeaseLost: it does no more, or the folder cannot be read, so that nobody knows.
        """
        if self._lost is None:
            try:
                newest = newest_number(self.directory)
                if newest > self.number:
                    successor = read_attempt(self.directory, newest, 0.0)
                    self._lost = (
                        f"{self.directory}: {successor or f'attempt {newest}'} has taken over from "
                        f"attempt {self.number}, this process; it writes nothing more"
                    )
                elif newest < self.number:
                    self._lost = self._deleted
            except OSError as error:
                # Not remembered: the next look may succeed.
                raise LeaseLost(
                    f"{self.directory}: cannot be read ({error.strerror or error}), so that "
                    "another process may own this work; nothing is written"
                ) from None
        if self._lost is not None:
            raise LeaseLost(self._lost)

    def release(self, state: State, reason: str = "") -> None:
        """Ends the attempt as ``state``. Never raises: what cannot be written is warned of."""
        if self._released.is_set():
            return
        self._released.set()
        with self._file_lock:
            try:
                if self._lost is None or self._is_mine():
                    self._write_last(_encoded(self._refreshed(state=state, reason=reason)))
            except OSError as error:
                logger.warning("%s: the end as %s is not noted (%s)", self._path, state, error)

    def _write_last(self, data: bytes) -> None:
        try:
            replace_file(self._path, data)
        except OSError:
            # On a full disk there may still be room in the file itself; half of it is no record,
            # and ages like one without heartbeats.
            with self._path.open("rb+") as file:
                file.write(data)
                file.truncate()

    def __enter__(self) -> "Lease":
        self._context.enter_context(publication_guard(self.check))
        earlier = ProgressReport.listener
        ProgressReport.listener = self.follow
        self._context.callback(setattr, ProgressReport, "listener", earlier)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._context.close()
        self.release(*_outcome(error))


def _outcome(error: BaseException | None) -> tuple[State, str]:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "done", ""
    if isinstance(error, Stopped):
        return "stopped", one_line(error.reason)
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "interrupted from the keyboard"
    name, text = type(error).__name__, one_line(str(error))
    if isinstance(error, UserError):
        return "failed", text
    return "failed", f"{name}: {text}" if text else name


def _first_record(number: int, log: Path | None) -> Record:
    now = time.time()
    return Record(
        attempt=number,
        owner=Owner.this_process(),
        state="running",
        started=now,
        updated=now,
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        log=None if log is None else str(log),
    )


def _encoded(record: Record) -> bytes:
    return record.model_dump_json(indent=2).encode() + b"\n"


def _tell_succession(work: Path, owner: Attempt, reason: str) -> None:
    # What ended by itself is no news; what was cut short is.
    ended = owner.record is not None and owner.record.state != "running"
    logger.log(
        logging.INFO if ended else logging.WARNING,
        "%s: takes over from %s, last heartbeat %s ago: %s",
        work, owner, duration(owner.age), reason,
    )  # fmt: skip
