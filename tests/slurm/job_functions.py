"""What the tests' jobs do. It is imported inside of jobs, so nothing heavy is imported here."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

REQUEUE_CODE = 85
"""The exit code of a rank that asks to be started again."""


def job_id() -> str:
    """The id of the job that this process belongs to, with its array index."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def record(folder: Path, event: str, **more: Any) -> None:
    """Adds a line to the rank's list of events."""
    rank = int(os.environ["SLURM_PROCID"])
    line = {
        "event": event,
        "job": job_id(),
        "rank": rank,
        "node": os.environ["SLURMD_NODENAME"],
        "process": os.getpid(),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "time": time.time(),
        **more,
    }
    with (folder / f"events-{job_id()}-{rank}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def events(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    """All events of all ranks in the order of their time, or those of one name."""
    lines = [
        json.loads(line)
        for file in folder.glob("events-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    chosen = [line for line in lines if event in {None, line["event"]}]
    return sorted(chosen, key=lambda line: line["time"])


@dataclass(frozen=True)
class Signalled:
    """A job that works until its time is over or a signal comes, as the launcher's jobs do.

    USR2 asks for another start: rank 0 leaves a marker, and every rank ends with code 85.
    TERM asks to end: the rank says so and ends with code 143.

    Attributes:
        folder: where events and markers go.
        seconds: how long the first start works; later starts end at once.
        closing: seconds that pass between the signal and the end, as saving a checkpoint takes.
        value: given back, to see that the same pickle runs again.
    """

    folder: Path
    seconds: float = 600.0
    closing: float = 0.0
    value: int = 0

    def __call__(self) -> int:
        received: list[str] = []

        def note(number: int, frame: FrameType | None) -> None:
            name = signal.Signals(number).name
            received.append(name)
            record(self.folder, name)

        signal.signal(signal.SIGUSR2, note)
        signal.signal(signal.SIGTERM, note)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        record(self.folder, "start", value=self.value)
        for _ in self._ticks(0.0 if restarts else self.seconds):
            if received:
                time.sleep(self.closing)
                self._leave(received[0])
        record(self.folder, "end")
        return self.value

    def _ticks(self, seconds: float) -> Iterator[None]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.05)
            yield

    def _leave(self, cause: str) -> None:
        if cause == "SIGTERM":
            record(self.folder, "terminated")
            sys.exit(128 + signal.SIGTERM)
        marker = self.folder / f"{job_id()}.requeue"
        if os.environ["SLURM_PROCID"] == "0":
            marker.touch()
        # The first rank that ends has the others killed, so nobody ends before the marker is there.
        for _ in self._ticks(20):
            if marker.exists():
                break
        record(self.folder, "leave")
        sys.exit(REQUEUE_CODE)


@dataclass(frozen=True)
class DieOfSignal:
    """A first start in which nothing handles USR2, as while Python still imports."""

    folder: Path

    def __call__(self) -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        record(self.folder, "start")
        if "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(60)


@dataclass(frozen=True)
class Tick:
    """A job that says twice a second that it lives, whatever is asked of it."""

    folder: Path
    seconds: float

    def __call__(self) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: record(self.folder, "SIGTERM"))
        record(self.folder, "start")
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            record(self.folder, "tick")
            time.sleep(0.5)
