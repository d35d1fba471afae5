"""Memory that runs out in training: all ranks together go on with half the micro-batch."""

import gc
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed import distributed_c10d

from g2rpo.errors import UserError
from g2rpo.files import write_json
from g2rpo.stop import StoppedAlone
from g2rpo.training.collective import of_all_ranks

logger = logging.getLogger(__name__)

SIZE_FILE = "training_micro_batch.json"
"""In the run folder: the size to resume with, where a run had to end for it."""


@dataclass
class Attempt:
    """Whether the work of one attempt was done on every rank."""

    succeeded: bool = True


class MicroBatchSize:
    """How many states go through one training forward, on all ranks the same.

    Attributes:
        states: the number.
        reduced: whether memory has run out, so that it is not the configured one.
    """

    def __init__(self, states: int, accelerator: Accelerator, run: Path) -> None:
        self.states, self.accelerator, self.run = states, accelerator, run
        self.reduced = False

    def restore(self, states: int | None) -> None:
        """Goes on with the size that an earlier start of the run had to come down to.

        Args:
            states: as the checkpoint has it; None where it was not reduced.
        """
        try:
            recorded = [int(json.loads((self.run / SIZE_FILE).read_text())["states"])]
        except (OSError, ValueError, KeyError):
            recorded = []
        smallest = min([*recorded, self.states if states is None else states])
        if smallest < self.states:
            self.states, self.reduced = smallest, True

    @contextmanager
    def attempt(self, sharded: bool) -> Iterator[Attempt]:
        """Around work that may run out of memory and can be done again.

        After the block all ranks know whether all of them did it. Where one did not, the size is
        halved. With ``sharded`` weights the others may be waiting for this rank anywhere within
        the work, so that it cannot go on: the run is ended, to be resumed with half the size.

        Raises:
            UserError: a single state does not fit.
            StoppedAlone: with sharded weights.
        """
        attempt = Attempt()
        exhausted = False
        try:
            yield attempt
        except torch.OutOfMemoryError:
            exhausted = True
        if exhausted and sharded:
            self._halve()
            write_json(self.run / SIZE_FILE, {"states": self.states})
            if self.accelerator.device.type == "cuda":
                # What this rank has begun with the others never ends, and is not to be waited for.
                distributed_c10d._abort_process_group()  # noqa: SLF001
            raise StoppedAlone(
                f"out of memory in training: it goes on from the last checkpoint, with "
                f"micro-batches of {self.states} states",
                resume=True,
            )
        if any(of_all_ranks(self.accelerator, exhausted)):
            attempt.succeeded = False
            self._halve()

    def _halve(self) -> None:
        if self.states == 1:
            raise UserError(
                "out of memory in a training forward or backward of a single state; use "
                "execution.gradient_checkpointing=true, execution.offload.rewards=true, "
                "execution.sharding=fsdp2 on more GPUs, or lora"
            )
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = self.states // 2
        if self.accelerator.is_main_process:
            logger.warning(
                "out of memory: training goes on with micro-batches of %d states, not %d",
                smaller, self.states,
            )  # fmt: skip
        self.states, self.reduced = smaller, True
