"""Requests to stop: made at any time, obeyed where no work is lost."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import ClassVar

TOGETHER_SECONDS = 1.0
"""Two TERMs within this time count as one: launchers also forward the signals of their ranks."""


@dataclass(frozen=True)
class StopReason:
    """Why the work stops, and whether it is resumed automatically."""

    text: str
    resume: bool


class Stopped(Exception):  # noqa: N818 - not an error
    """The work has stopped on request; finished work is kept.

    Attributes:
        reason: one line.
        resume: whether it is resumed automatically.
    """

    def __init__(self, reason: str, resume: bool) -> None:
        super().__init__(reason, resume)
        self.reason, self.resume = reason, resume

    def __str__(self) -> str:
        return f"stopped: {self.reason}"


class StoppedAlone(Stopped):
    """This process has stopped alone and can no longer take part in collective operations."""


class StopRequest:
    """The request of this process, which long work checks between its parts."""

    _reason: ClassVar[StopReason | None] = None

    @classmethod
    def request(cls, reason: str, resume: bool) -> None:
        """Requests a stop. An earlier request is kept, unless only this one resumes."""
        earlier = cls._reason
        if earlier is None or (resume and not earlier.resume):
            cls._reason = StopReason(reason, resume)

    @classmethod
    def requested(cls) -> StopReason | None:
        """The request, or None."""
        return cls._reason

    @classmethod
    def obey(cls) -> None:
        """Raises if a stop was requested.

        Raises:
            Stopped: with the reason.
        """
        if cls._reason is not None:
            raise Stopped(cls._reason.text, cls._reason.resume)

    @classmethod
    def clear(cls) -> None:
        """Clears the request."""
        cls._reason = None

    @classmethod
    @contextmanager
    def handle_signals(cls) -> Iterator[None]:
        """Turns USR2 and TERM into requests; restores the previous handlers at the end.

        After USR2 (sent by SLURM before a time limit or preemption) the work is resumed, after
        TERM it is not. A second TERM has its previous effect, so that stuck processes can be ended.
        Does nothing outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        watched = (signal.SIGUSR2, signal.SIGTERM)
        earlier = {number: signal.getsignal(number) for number in watched}
        first_term: list[float] = []

        def restore(number: signal.Signals) -> None:
            handler = earlier[number]
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

        def near_the_end(_number: int, _frame: FrameType | None) -> None:
            cls.request("SLURM's time limit or preemption is near", resume=True)

        def terminated(_number: int, _frame: FrameType | None) -> None:
            cls.request("terminated", resume=False)
            if not first_term:
                first_term.append(time.monotonic())
            elif time.monotonic() - first_term[0] > TOGETHER_SECONDS:
                restore(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)

        handlers = dict(zip(watched, (near_the_end, terminated), strict=True))
        for number, handler in handlers.items():
            signal.signal(number, handler)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                if signal.getsignal(number) is handler:  # unless already restored
                    restore(number)
