"""Joins the ranks of a stage through torch.distributed, from submitit's environment.

Unresolvable host names and used ports are reported at once; torch itself would wait for minutes.
If one rank fails, srun (or the local launcher) ends the others.
"""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

from g2rpo.errors import UserError

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others, e.g. while the first one validates or saves alone."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, from 0, and the number of ranks of its stage."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes shared files."""
        return self.rank == 0

    def agree(self, message: str | None) -> str | None:
        """The first rank's ``message``, on all ranks."""
        if self.count == 1:
            return message
        # Slow to import, and one rank does not need it.
        from accelerate.utils import broadcast_object_list

        received: list[str | None] = broadcast_object_list([message])
        return received[0]


@contextmanager
def join(expected: int) -> Iterator[Ranks]:
    """Joins the process group of a stage with several ranks; leaves it on exit.

    Raises:
        UserError: wrong number of ranks, the first node's name does not resolve, or its port cannot
            be opened.
    """
    if expected == 1:
        yield Ranks()
        return
    _export()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if count != expected:
        raise UserError(f"the stage needs {expected} ranks, {count} were started; submit it again")
    launched = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun has already opened the port
    check_master(address, port, first=rank == 0 and not launched)
    import torch  # slow to import: errors above come first
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    try:
        yield Ranks(rank, count)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def exit_rank(code: int) -> NoReturn:
    """Ends this process with ``code``; a rank among several skips Python's shutdown.

    FSDP's device meshes keep a destroyed process group's threads alive until then, and such a
    thread can abort a rank (SIGABRT) whose work is complete.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch" in sys.modules:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _export() -> None:
    """Exports rank, world size and master address, from SLURM through submitit unless set."""
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        return
    from submitit.helpers import TorchDistributedEnvironment

    # The cluster profile's MASTER_ADDR overrides submitit's; accelerate picks the GPU by
    # LOCAL_RANK.
    given = {name: os.environ[name] for name in ("MASTER_ADDR",) if name in os.environ}
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    os.environ.update(given)


def check_master(address: str, port: int, *, first: bool) -> None:
    """Checks that the first rank's address resolves and, on the first rank, that its port opens.

    Raises:
        UserError: names the address and the fix.
    """
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise UserError(
            f"{socket.gethostname()} cannot resolve the first node's name {address!r} "
            f"({error.strerror}); set MASTER_ADDR under environment: in the cluster profile to an "
            "address that all nodes can reach"
        ) from None
    if not first:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"cannot open port {port} on {socket.gethostname()} ({error.strerror}); set "
                "MASTER_PORT under environment: in the cluster profile to a free port"
            ) from None
