"""Runs a graph on this machine: one stage at a time per device.

Without GPUs, workers are reused across stages, since starting one takes seconds; with GPUs each
stage gets new processes, so that its memory is released. A dead worker fails only its own stage.
"""

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from g2rpo.stop import StopRequest
from slurm.graph import Graph, Stage
from slurm.job import TERMINATED, run_stage
from slurm.submission import Submission

GRACE = 60.0
"""Seconds that interrupted stages have to save their progress."""
_CONTEXT = multiprocessing.get_context("spawn")
_PR_SET_PDEATHSIG = 1


class Observer(Protocol):
    """Callbacks for the events of a run."""

    def started(self, stage: Stage) -> None:
        """A stage has started."""

    def ended(self, stage: Stage, code: int) -> None:
        """A stage has ended with an exit code; 0 is success."""

    def cancelled(self, stage: Stage, because: Stage) -> None:
        """A stage cannot run, since one it needs has failed."""

    def waiting(self, running: Sequence[Stage]) -> None:
        """Called every second while stages run."""


@dataclass(frozen=True)
class Slots:
    """The devices of this machine.

    Attributes:
        count: single-rank stages that run at the same time.
        gpus: GPU ids, one per slot; empty without GPUs.
        prepare: ``module:function`` called in each new process before its first stage.
    """

    count: int
    gpus: tuple[str, ...] = ()
    prepare: str | None = None

    @classmethod
    def found(cls, jobs: int | None = None, prepare: str | None = None) -> "Slots":
        """One slot per GPU, else per core, at most eight; ``jobs`` if given."""
        import torch  # slow to import; submitting does not need it

        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else None
            gpus = tuple(names or (str(n) for n in range(torch.cuda.device_count())))
            return cls(min(jobs or len(gpus), len(gpus)), gpus, prepare)
        return cls(jobs or max(1, min(8, os.cpu_count() or 1)), (), prepare)


@contextmanager
def interrupted_by_term() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt, since background processes may ignore SIGINT."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Running:
    """A running stage: the slots it takes, its processes, and the exit codes of ended ranks."""

    stage: Stage
    slots: tuple[int, ...]
    processes: list["_Process"]
    codes: list[int] = field(default_factory=list)


@dataclass
class _Process:
    process: BaseProcess
    connection: multiprocessing.connection.Connection
    stage: str | None = None


class LocalRun:
    """Runs stages of a saved submission; a failed one cancels only the stages that need it."""

    def __init__(
        self, submission: Submission, todo: Graph, slots: Slots, observer: Observer
    ) -> None:
        self.submission, self.graph, self.slots = submission, todo, slots
        self.observer = observer
        self.outcome: dict[str, int] = {}
        self._waiting = list(todo.stages.values())
        self._running: list[_Running] = []
        self._idle: dict[int, _Process] = {}

    def run(self) -> dict[str, int]:
        """Runs everything; returns the exit codes, :data:`TERMINATED` for cancelled stages.

        Raises:
            KeyboardInterrupt: after INT or TERM, once the running stages have saved.
        """
        with interrupted_by_term():
            try:
                while self._waiting or self._running:
                    self._cancel_hopeless()
                    while (stage := self._next()) is not None:
                        self._start(stage)
                    if self._running:
                        self._collect()
            finally:
                self._stop_all()
        return self.outcome

    # What runs next

    def _cancel_hopeless(self) -> None:
        failed = {name for name, code in self.outcome.items() if code}
        for stage in list(self._waiting):
            blocked = [name for name in stage.needs if name in failed]
            if blocked:
                self._waiting.remove(stage)
                self.outcome[stage.name] = TERMINATED
                failed.add(stage.name)
                self.observer.cancelled(stage, self.graph[blocked[0]])

    def _next(self) -> Stage | None:
        """The first ready stage, if enough slots are free; later ones do not overtake it."""
        free = self._free()
        for stage in self._waiting:
            if any(name not in self.outcome for name in (*stage.needs, *stage.after)):
                continue
            wanted = min(stage.resources.ranks, self.slots.count)
            return stage if len(free) >= wanted else None
        return None

    def _free(self) -> list[int]:
        taken = {slot for running in self._running for slot in running.slots}
        return [slot for slot in range(self.slots.count) if slot not in taken]

    # Processes

    def _start(self, stage: Stage) -> None:
        self._waiting.remove(stage)
        self.observer.started(stage)
        ranks = stage.resources.ranks
        slots = tuple(self._free()[: min(ranks, self.slots.count)])
        if ranks == 1:
            idle = self._idle.pop(slots[0], None)
            if idle is not None and not idle.process.is_alive():  # killed while idle
                _dismiss([idle])
                idle = None
            processes = [idle or self._spawn(self._environment(slots[0]))]
        else:
            processes = [self._spawn(environment) for environment in self._ranks(ranks, slots)]
        for process in processes:
            process.stage = stage.name
            process.connection.send(stage.name)
        self._running.append(_Running(stage, slots, processes))

    def _environment(self, slot: int) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": self.slots.gpus[slot]} if self.slots.gpus else {}

    def _ranks(self, count: int, slots: Sequence[int]) -> Iterator[dict[str, str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        devices = ",".join(self.slots.gpus[slot] for slot in slots) if self.slots.gpus else None
        for rank in range(count):
            yield {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(count),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(count),
                **({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}),
            }

    def _spawn(self, environment: Mapping[str, str]) -> _Process:
        ours, theirs = _CONTEXT.Pipe()
        threads = _threads_of_each(self.slots.count)
        arguments = (theirs, self.submission.folder, self.slots.prepare, threads, environment)
        process = _CONTEXT.Process(target=_work, args=arguments, daemon=False)
        process.start()
        theirs.close()
        return _Process(process, ours)

    def _collect(self) -> None:
        """Waits up to a second for processes to finish their stage."""
        by_connection = {
            process.connection: (running, process)
            for running in self._running
            for process in running.processes
            if process.stage is not None
        }
        ready = multiprocessing.connection.wait(list(by_connection), timeout=1.0)
        if not ready:
            self.observer.waiting([running.stage for running in self._running])
        for connection in ready:
            running, process = by_connection[connection]  # type: ignore[index]
            running.codes.append(_answer(process))
            process.stage = None
            if running.codes[-1]:  # the other ranks would wait for it forever
                _end([other for other in running.processes if other.stage is not None])
            if len(running.codes) == len(running.processes):
                self._finish(running)

    def _finish(self, running: _Running) -> None:
        self._running.remove(running)
        code = next((code for code in running.codes if code), 0)
        self.outcome[running.stage.name] = code
        (process, *_) = running.processes
        kept = len(running.processes) == 1 and not self.slots.gpus
        # After a termination the process is about to exit.
        if kept and code != TERMINATED and process.process.is_alive():
            self._idle[running.slots[0]] = process
        else:
            _dismiss(running.processes)
        self.observer.ended(running.stage, code)

    def _stop_all(self) -> None:
        busy = [process for running in self._running for process in running.processes]
        _end(busy)
        _dismiss([*busy, *self._idle.values()])


def _answer(process: _Process) -> int:
    try:
        code: int = process.connection.recv()
    except EOFError:
        process.process.join(timeout=10)
        code = process.process.exitcode or 1
        if code < 0:
            name = signal.Signals(-code).name
            sys.stderr.write(f"the process of {process.stage} was killed by {name}\n")
    return code


def _end(processes: Sequence[_Process]) -> None:
    """Asks processes to save and exit; kills those that do not."""
    for process in processes:
        if process.process.is_alive():
            process.process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        process.process.join(timeout=max(0.1, deadline - time.monotonic()))
        if process.process.is_alive():
            process.process.kill()


def _dismiss(processes: Sequence[_Process]) -> None:
    for process in processes:
        process.connection.close()
    for process in processes:
        process.process.join(timeout=10)
        if process.process.is_alive():
            process.process.kill()


def _threads_of_each(workers: int) -> int:
    """Torch threads per worker: ``OMP_NUM_THREADS``, else an equal share of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return max(1, (os.cpu_count() or 1) // workers)


def _work(
    connection: Any,
    folder: Path,
    prepare: str | None,
    threads: int,
    environment: Mapping[str, str],
) -> None:
    """Main function of a worker: runs stages until its parent closes the connection."""
    # A killed parent makes the stage save and stop instead of leaving it running.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        return  # it died before prctl took effect
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent forwards interrupts
    os.environ.update(environment)
    import torch  # reads CUDA_VISIBLE_DEVICES when imported

    torch.set_num_threads(threads)
    if prepare is not None:
        pkgutil.resolve_name(prepare)()
    submission = Submission.load(folder)
    with StopRequest.handle_signals():
        while True:
            try:
                stage = connection.recv()
            except (EOFError, OSError):
                return
            with _logged(submission.local_log(stage)):
                code = run_stage(submission.folder, stage)
            connection.send(code)
            if code == TERMINATED:
                return


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Redirects standard output and error, of subprocesses too, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with path.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
