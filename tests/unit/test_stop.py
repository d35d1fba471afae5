"""Requests to stop, and the signals that make them."""

import os
import pickle
import signal
import subprocess
import sys
import threading

import pytest

from g2rpo.stop import Stopped, StopReason, StopRequest


def test_a_request_stays_until_it_is_obeyed() -> None:
    StopRequest.obey()
    StopRequest.request("a reason", resume=False)
    StopRequest.request("another", resume=False)
    assert StopRequest.requested() == StopReason("a reason", resume=False)
    with pytest.raises(Stopped, match="stopped: a reason") as caught:
        StopRequest.obey()
    assert (caught.value.reason, caught.value.resume) == ("a reason", False)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (copied.reason, copied.resume) == ("a reason", False)


@pytest.mark.parametrize("order", [("USR2", "TERM"), ("TERM", "USR2")])
def test_a_wish_to_resume_outlives_a_termination(order: tuple[str, str]) -> None:
    with StopRequest.handle_signals():
        for name in order:
            signal.raise_signal(signal.Signals[f"SIG{name}"])
    reason = StopRequest.requested()
    assert reason is not None
    assert reason.resume
    assert "time limit" in reason.text


def test_a_termination_alone_is_not_resumed() -> None:
    with StopRequest.handle_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher passing it on
    assert StopRequest.requested() == StopReason("terminated", resume=False)


def test_the_earlier_handlers_come_back() -> None:
    def own(number: int, frame: object) -> None:
        raise AssertionError

    numbers = (signal.SIGTERM, signal.SIGUSR2)
    before = {number: signal.signal(number, own) for number in numbers}
    try:
        with StopRequest.handle_signals():
            assert all(signal.getsignal(number) is not own for number in numbers)
        assert all(signal.getsignal(number) is own for number in numbers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_thread_handles_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with StopRequest.handle_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


STUCK = """
import time
from g2rpo import stop
stop.TOGETHER_SECONDS = 0.0
with stop.StopRequest.handle_signals():
    print("ready", flush=True)
    while stop.StopRequest.requested() is None:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


def test_a_second_term_ends_a_stuck_process() -> None:
    command = [sys.executable, "-c", STUCK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == "asked\n"
        process.terminate()
        assert process.wait(timeout=600) == -signal.SIGTERM
