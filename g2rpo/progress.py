"""Progress of long work: a bar with ETA in a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from g2rpo.config import StrictModel
from g2rpo.text import visible

_LEAST_WIDTH = 80
"""Minimum terminal width for a bar."""
LINE_SECONDS = 15.0


def duration(seconds: float) -> str:
    """``seconds`` as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


@contextmanager
def without_library_bars() -> Iterator[None]:
    """Hides the libraries' own progress bars, e.g. while models load."""
    # Imported late: `g2rpo --help` imports this module.
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


class WorkProgress(StrictModel):
    """The progress of some work, as counted by a :class:`ProgressReport`."""

    description: str = ""
    done: int | None = None
    total: int | None = None
    note: str = ""
    text: str = ""
    """Only in records of older versions."""
    elapsed_seconds: float | None = None
    remaining_seconds: float | None = None

    def __str__(self) -> str:
        count = "" if self.done is None else f"{self.done}/{self.total}"
        shown = " ".join(part for part in (self.description, count) if part)
        left = self.remaining_seconds
        return shown if left is None else f"{shown}, ETA {duration(left)}"


class ProgressReport:
    """A context that reports the progress of some work.

    In a terminal it draws a bar; elsewhere it prints a line at most every ``LINE_SECONDS``, and one
    at the end. Silent unless ``enabled`` (only the first rank).
    """

    bars: ClassVar[bool] = True
    """Whether this process draws bars: those of several processes would collide."""
    listener: ClassVar[Callable[[WorkProgress], None] | None] = None
    """Called at the start and every update of reports that are not silent."""

    def __init__(
        self, description: str, total: int, *, done: int = 0, enabled: bool = True
    ) -> None:
        self.description, self.total, self.done = visible(description), total, done
        self.enabled = enabled
        self._first, self._started = done, time.monotonic()
        self._last_line = float("-inf")
        self._shown: tuple[int, int] | None = None
        self._note = ""
        self._bar: Progress | None = None
        console = Console(stderr=True)
        # A narrower bar would truncate its numbers.
        if enabled and console.is_terminal and self.bars and console.width >= _LEAST_WIDTH:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column()),
                BarColumn(min(40, console.width - _LEAST_WIDTH + 10)),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False, table_column=Column()),
                console=console,
            )
            self._task = self._bar.add_task(self.description, total=total, completed=done, note="")

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._bar.start()
        self._notify()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.enabled and kind is None and self._shown not in (None, self._count):
            self._print_line()

    @property
    def _count(self) -> tuple[int, int]:
        return self.done, self.total

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def remaining(self) -> float | None:
        """Estimated remaining seconds; None before this process has finished a unit."""
        made = self.done - self._first
        return self.seconds / made * (self.total - self.done) if made else None

    def expect(self, total: int) -> None:
        """Changes the total; shown with the next update."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Adds ``count`` finished units; ``note`` is shown next to the bar."""
        self.update(self.done + count, note)

    def update(self, done: int, note: str = "", *, always: bool = False) -> None:
        """Sets the number of finished units; ``always`` prints a log line now."""
        note = visible(note)
        self.done, self._note = done, note
        self._notify()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif self.enabled and (always or time.monotonic() - self._last_line >= LINE_SECONDS):
            self._print_line()
            self._last_line = time.monotonic()

    def _notify(self) -> None:
        listener = type(self).listener
        if self.enabled and listener is not None:
            listener(
                WorkProgress(
                    description=self.description,
                    done=self.done,
                    total=self.total,
                    note=self._note,
                    elapsed_seconds=self.seconds,
                    remaining_seconds=self.remaining,
                )
            )

    def _print_line(self) -> None:
        self._shown = self._count
        share = f"{self.description}: {self.done}/{self.total}"
        left = "" if self.remaining is None else f", ETA {duration(self.remaining)}"
        line = f"{share}, {duration(self.seconds)} elapsed{left}  {self._note}".rstrip()
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
