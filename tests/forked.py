"""Processes forked from one that has imported the libraries: starting Python anew takes seconds."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

TIMEOUT = 900
PRELOADED = [
    "g2rpo.training.loop", "g2rpo.policy.flux", "g2rpo.policy.sd3", "torch._dynamo", "open_clip",
    "reproduce.cli", "reproduce.jobs.launch", "reproduce.jobs.display", "reproduce.stages.sampling",
    "reproduce.stages.scoring", "reproduce.stages.render", "benchmarks.gpu_check.checks",
]  # fmt: skip
"""Also what commands import when they need it."""


def server() -> ForkServerContext:
    """Forks processes from a server that has used no library but only imported them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Command:
    """``g2rpo`` in ``folder``, in a process of its own; what it writes goes to files."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self._streams = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115
        names = [stream.name for stream in self._streams]
        given = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"} | environment
        self.process = server().Process(target=_run, args=(folder, arguments, names, dict(given)))
        self.process.start()

    def wait(self) -> tuple[int, str, str]:
        """Its exit code, output and errors, when it has ended."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, "a command takes longer than its time-out"
        output, errors = (Path(stream.name).read_text() for stream in self._streams)
        return self.process.exitcode, output, errors

    def kill(self) -> None:
        """Kills it, if it still runs."""
        self.process.kill()
        self.process.join()


def _run(
    folder: Path, arguments: Sequence[str], streams: Sequence[str], environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in enumerate(streams, start=1):
        with Path(name).open("wb") as file:
            os.dup2(file.fileno(), number)
    import torch

    from reproduce import cli

    torch.set_num_threads(1)
    sys.argv = ["g2rpo", *arguments]
    cli.main()
