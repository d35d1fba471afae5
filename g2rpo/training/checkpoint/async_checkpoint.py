"""Checkpoints of sharded weights, written by all ranks in the background.

``torch.distributed.checkpoint`` copies the tensors to the CPU's memory and writes them while the
training continues. A checkpoint counts once it is complete: only then does it get its state file,
the last of its files, and its name.
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save

from g2rpo.checksums import checksums_of
from g2rpo.files import check_publication, publish_folder
from g2rpo.training.checkpoint.folder import (
    Progress,
    checkpoint_folder,
    prune,
    write_state,
    writing,
)
from g2rpo.training.collective import of_all_ranks, raise_on_all_ranks
from g2rpo.training.config import CheckpointConfig
from g2rpo.training.metrics import keep_metrics

Checksums = dict[str, dict[str, Any]]
SHARDS = "shards"
"""The folder of a checkpoint that holds every rank's part."""


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line; the first rank's error, where ``error`` is of several."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300]


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    future: Future[Checksums]
    progress: Progress
    temporary: Path


class BackgroundWriter:
    """Writes one checkpoint at a time; all ranks call everything here together.

    Attributes:
        run: the run folder.
        group: a process group of all ranks that works on the CPU; None with one rank.
    """

    def __init__(self, run: Path, config: CheckpointConfig, accelerator: Accelerator) -> None:
        self.run, self.config, self.accelerator = run, config, accelerator
        several = accelerator.num_processes > 1
        self.group: Any = torch.distributed.new_group(backend="gloo") if several else None
        self._pending: _Pending | None = None
        self._measuring = ThreadPoolExecutor(1)

    def start(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Copies ``tensors`` and begins to write them; ends the checkpoint before first.

        Raises:
            UserError: on all ranks, where a checkpoint cannot be written.
        """
        self.finish()
        folder = checkpoint_folder(self.run, progress.iteration)
        temporary = folder.parent / f".{folder.name}.{SHARDS}.tmp"
        with raise_on_all_ranks(self.accelerator), writing(self.run, f"checkpoint {folder.name}"):
            if self.accelerator.is_main_process:
                check_publication()
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / SHARDS).mkdir(parents=True)
                keep_metrics(self.run, temporary)
        future = async_save(
            dict(tensors),
            checkpoint_id=temporary / SHARDS,
            process_group=self.group,
            no_dist=self.group is None,
        )
        assert isinstance(future, Future)
        measured = self._measuring.submit(self._measured, future, temporary)
        self._pending = _Pending(measured, progress, temporary)

    def _measured(self, written: Future[Any], temporary: Path) -> Checksums:
        """The checksums of the files that this rank has written, once it has."""
        written.result()
        own = (temporary / SHARDS).glob(f"__{self.accelerator.process_index}_*")
        return checksums_of(own, temporary)

    @property
    def written(self) -> bool:
        """Whether nothing is being written by this rank."""
        return self._pending is None or self._pending.future.done()

    def finish(self) -> None:
        """Waits until the checkpoint is written, if any is, and lets it count.

        Raises:
            UserError: on all ranks, where it cannot be written; the ones before are intact.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        folder = checkpoint_folder(self.run, pending.progress.iteration)
        what, measured = f"checkpoint {folder.name}", {}
        with raise_on_all_ranks(self.accelerator), writing(self.run, what):
            try:
                measured = pending.future.result()
            except (CheckpointException, RuntimeError) as failed:
                raise OSError(reason_of(failed)) from failed
        files = {k: v for part in of_all_ranks(self.accelerator, measured) for k, v in part.items()}
        with raise_on_all_ranks(self.accelerator), writing(self.run, what):
            if self.accelerator.is_main_process:
                write_state(pending.temporary, pending.progress, files)
                publish_folder(pending.temporary, folder)
                prune(self.run, self.config, pending.progress.iteration)
