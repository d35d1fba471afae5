"""The time that an iteration takes."""

import time
from collections.abc import Callable

import torch


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock of the seconds for which ``device`` is in use.

    On a GPU that is the wall time. On a CPU it is the processor time per thread: other work on the
    machine makes the wall time longer, but a method no more expensive.
    """
    if device.type == "cpu":
        return lambda: time.process_time() / torch.get_num_threads()
    return time.perf_counter


class PhaseClock:
    """The device-seconds of one iteration and of its consecutive phases, see :func:`device_clock`.

    Attributes:
        phases: device-seconds by phase.
    """

    def __init__(self, device: torch.device) -> None:
        self._now = device_clock(device)
        self._started = self._last = self._now()
        self.phases: dict[str, float] = {}

    def end(self, phase: str, seconds: float | None = None) -> None:
        """Ends a phase now, or after ``seconds`` of the time since the last one."""
        if seconds is None:
            seconds = self._now() - self._last
        self.phases[phase] = seconds
        self._last += seconds

    @property
    def device_seconds(self) -> float:
        """Device-seconds since the start."""
        return self._now() - self._started
