"""Requests to stop: asked for at any time, obeyed where nothing is lost."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import ClassVar

TOGETHER_SECONDS = 1.0
"""Two TERMs within so many seconds are one: a launcher passes on what its ranks got as well."""


@dataclass(frozen=True)
class StopReason:
    """Why the work is to stop, and whether it is to be gone on with by itself."""

    text: str
    resume: bool


class Stopped(Exception):  # noqa: N818 - it ends the work, and nothing is wrong
    """The work has stopped as it was asked to; what was done is kept.

    Attributes:
        reason: one line.
        resume: whether it is to be started again without being asked.
    """

    def __init__(self, reason: str, resume: bool) -> None:
        super().__init__(reason, resume)
        self.reason, self.resume = reason, resume

    def __str__(self) -> str:
        return f"stopped: {self.reason}"


class StoppedAlone(Stopped):
    """This process has stopped alone: it can do nothing more together with its stage's others."""


class StopRequest:
    """The one request of this process. Long work looks at it between two parts."""

    _reason: ClassVar[StopReason | None] = None

    @classmethod
    def request(cls, reason: str, resume: bool) -> None:
        """Asks to stop. An earlier request stays, unless only this one wants to resume."""
        earlier = cls._reason
        if earlier is None or (resume and not earlier.resume):
            cls._reason = StopReason(reason, resume)

    @classmethod
    def requested(cls) -> StopReason | None:
        """The request, or None."""
        return cls._reason

    @classmethod
    def obey(cls) -> None:
        """Raises where a stop was asked for.

        Raises:
            Stopped: with the reason.
        """
        if cls._reason is not None:
            raise Stopped(cls._reason.text, cls._reason.resume)

    @classmethod
    def clear(cls) -> None:
        """Forgets the request."""
        cls._reason = None

    @classmethod
    @contextmanager
    def handle_signals(cls) -> Iterator[None]:
        """Turns USR2 and TERM into requests; afterwards the earlier handlers are back.

        After USR2 (SLURM sends it before a time limit or a preemption) the work is to be resumed,
        after TERM it is not. A second TERM does what it did before, so that a process that is
        stuck can be ended. In another thread than the main one nothing is handled.
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
                if signal.getsignal(number) is handler:  # not where it was given back already
                    restore(number)
