"""Progress of one training: a bar with the time left on a terminal, plain lines in a log."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TrainingProgress:
    """Shows the steps of ``part``; use as a context manager around the training loop."""

    def __init__(self, part: str, total: int, seconds_between_lines: float = 20.0) -> None:
        self.part = part
        self.total = total
        self.start = time.monotonic()
        self._interval = seconds_between_lines
        self._next_line = self.start
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description:<22}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(part, total=total, note="")

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, note: str, always: bool = False) -> None:
        """Tells that ``step`` steps are done; ``always`` prints the line now in a log."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        if always or now >= self._next_line or step == self.total:
            self._next_line = now + self._interval
            left = self.seconds / max(step, 1) * (self.total - step)
            message = f"{self.part}: {step}/{self.total}, {self.seconds:.0f} s, {left:.0f} s left"
            sys.stderr.write(f"{message}, {note}\n")
            sys.stderr.flush()
