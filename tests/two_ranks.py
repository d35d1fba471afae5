"""Two CPU ranks."""

import os
import socket
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from forked import TIMEOUT, server


def on_two_ranks(work: Callable[..., object], *arguments: Any) -> int:
    """Runs ``work(*arguments)`` on two ranks; the exit code of the first rank that fails, or 0.

    As under a launcher, the other rank is killed when one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        server().Process(target=_run_rank, args=(rank, port, work, arguments)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    running, code = list(ranks), 0
    while running and not code:
        ended = wait([process.sentinel for process in running], TIMEOUT)
        assert ended, "two ranks take longer than their time-out"
        for process in [one for one in running if one.sentinel in ended]:
            process.join()
            running.remove(process)
            code = code or process.exitcode or 0
    for process in running:
        process.kill()
        process.join()
    return code


def _run_rank(
    rank: int, port: int, work: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    import torch

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    work(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
