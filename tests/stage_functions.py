"""Stages that stand in for real ones in tests of the launcher: they do what their payload says.

Workers import this module by its name, so it is light and has no state of its own.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from g2rpo.errors import UserError
from g2rpo.stop import Stopped, StopRequest
from slurm.cluster import Cluster
from slurm.distributed import Ranks
from slurm.graph import Stage
from slurm.submission import Submission

ENTRY = "stage_functions:run"
LONG = 600.0


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


def saved_submission(
    folder: Path, stages: Sequence[Stage], cluster: Cluster | None = None
) -> Submission:
    """A saved submission of stages that :func:`run` does."""
    submission = Submission(
        folder=folder,
        title="stages of a test",
        entry=ENTRY,
        directory=folder,
        cluster=cluster or Cluster(name="local", kind="local"),
        stages=tuple(stages),
        created=time.time(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    submission.save()
    return submission


def events_of(submission: Submission) -> list[list[str]]:
    """The events of stages, in order: event, stage, process id, ..."""
    path = submission.folder / "events"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def _record(submission: Submission, *words: object) -> None:
    with (submission.folder / "events").open("a") as file:
        file.write(" ".join(str(word) for word in words) + "\n")


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + LONG
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def run(submission: Submission, stage: Stage, ranks: Ranks) -> None:
    """The entry point: does ``payload["do"]``."""
    _record(submission, "begin", stage.name, os.getpid(), ranks.rank, ranks.count)
    action = str(stage.payload.get("do", "nothing"))
    _simple(action, submission, stage)
    if action == "meet, then fail on the second rank":
        found = ranks.agree(f"from {ranks.rank}")
        _record(submission, "agreed", ranks.rank, found)
        if ranks.rank == 1:
            time.sleep(0.5)  # the first one is done by then
            raise UserError("the second rank")
    _record(submission, "end", stage.name, os.getpid(), ranks.rank)


def _simple(action: str, submission: Submission, stage: Stage) -> None:
    if action == "user error":
        raise UserError("a mistake that can be fixed")
    if action == "full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/results/x")
    if action == "out of memory":
        raise OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
    if action == "bug":
        raise ZeroDivisionError("a bug")
    if action in ("stop", "stop and resume"):
        raise Stopped("a reason", resume=action == "stop and resume")
    if action == "print":
        sys.stdout.write("to standard output\n")
        os.write(2, b"to standard error\n")
    if action == "be killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "work on":
        _work_on(submission, stage)
    if action == "wait":
        _wait_for(submission.folder / str(stage.payload["for"]))


def _work_on(submission: Submission, stage: Stage) -> None:
    """Works until it is asked to stop, then takes a moment to save."""
    deadline = time.monotonic() + LONG
    try:
        while time.monotonic() < deadline:
            StopRequest.obey()
            time.sleep(0.02)
    except Stopped:
        time.sleep(0.3)
        _record(submission, "saved", stage.name, os.getpid())
        raise


class Listener:
    """An observer that records all events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, ...]] = []

    def started(self, stage: Stage) -> None:
        """Records it."""
        self.events.append(("started", stage.name))

    def ended(self, stage: Stage, code: int) -> None:
        """Records it."""
        self.events.append(("ended", stage.name, str(code)))

    def cancelled(self, stage: Stage, because: Stage) -> None:
        """Records it."""
        self.events.append(("cancelled", stage.name, because.name))

    def waiting(self, running: Sequence[Stage]) -> None:
        """Says nothing."""
