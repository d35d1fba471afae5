"""The ranks of one stage find each other: torch.distributed from submitit's environment.

What cannot work is told at once: torch itself waits for minutes where a host name does not resolve.
When one rank leaves with an error, srun (or the local launcher) ends the others.
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
"""How long a rank waits for the others: as long as the first one validates or saves alone."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its stage.

    Attributes:
        rank: its number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what there is one of."""
        return self.rank == 0

    def agree(self, message: str | None) -> str | None:
        """The first rank's ``message``, on all ranks."""
        if self.count == 1:
            return message
        from accelerate.utils import broadcast_object_list  # takes seconds; one rank needs none

        found: list[str | None] = broadcast_object_list([message])
        return found[0]


@contextmanager
def join(expected: int) -> Iterator[Ranks]:
    """Joins the process group of the stage, where it has several ranks, and leaves it again.

    Raises:
        UserError: the ranks that were started are not those the stage needs, the first node's
            name does not resolve, or its port is in use or not open in time.
    """
    if expected == 1:
        yield Ranks()
        return
    _export()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if count != expected:
        raise UserError(f"{count} ranks were started for a stage of {expected}; submit it again")
    launched = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun has opened the port itself
    check_meeting_point(address, port, first=rank == 0 and not launched)
    import torch  # only now: a mistake above is told without the seconds that torch takes
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
    """Rank, world size and meeting point, from SLURM through submitit or as given already."""
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        return
    from submitit.helpers import TorchDistributedEnvironment

    # What the cluster profile sets goes before what submitit finds. Which GPU a rank takes is
    # accelerate's choice, by LOCAL_RANK.
    given = {name: os.environ[name] for name in ("MASTER_ADDR",) if name in os.environ}
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    os.environ.update(given)


def check_meeting_point(address: str, port: int, *, first: bool) -> None:
    """Refuses an address that does not resolve and a port that cannot be used.

    Args:
        address: the host of the first rank.
        port: the port that the first rank opens.
        first: whether this is the first rank.

    Raises:
        UserError: one line that names the address and what to do.
    """
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise UserError(
            f"{socket.gethostname()} does not resolve the first node's name {address!r} "
            f"({error.strerror}), so the ranks cannot meet: set MASTER_ADDR to an address that "
            "all nodes reach (environment: of the cluster profile)"
        ) from None
    if not first:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"port {port} of {socket.gethostname()} cannot be opened ({error.strerror}), so "
                "the ranks cannot meet: set MASTER_PORT to a free one (environment: of the "
                "cluster profile)"
            ) from None
