"""Writes checkpoints: complete ones by the first rank, sharded ones by all ranks in the background.

``torch.distributed.checkpoint`` copies sharded tensors to the CPU's memory and writes them while
training continues. A checkpoint counts only once it is complete: it then gets its state file, the
last of its files, and its name.
"""

import copy
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save

from g2rpo.checksums import checksums_of
from g2rpo.errors import reason
from g2rpo.files import atomic_folder, check_publication, publish_folder
from g2rpo.training.checkpoint.folder import (
    SHARDS,
    Progress,
    checkpoint_folder,
    prune,
    write_state,
    writing,
)
from g2rpo.training.checkpoint.state import TrainingState
from g2rpo.training.collective import of_all_ranks, raise_on_all_ranks
from g2rpo.training.metrics import keep_metrics

Checksums = dict[str, dict[str, Any]]


def reason_of(error: BaseException) -> str:
    """An error's message in one line; if it holds several ranks' errors, the first one's."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return reason(error, 300)


@dataclass
class _Pending:
    """A sharded checkpoint that is being written."""

    future: Future[Checksums]
    progress: Progress
    temporary: Path


class CheckpointWriter:
    """Saves a training's state. All ranks call every method together.

    Attributes:
        sharded: whether checkpoints are sharded and written in the background.
        group: the process group of sharded checkpoints, on the CPU; None with one rank.
    """

    def __init__(self, state: TrainingState) -> None:
        self.state, self.run, self.accelerator = state, state.run, state.accelerator
        self.sharded = state.config.execution.sharding == "fsdp2"
        several = self.sharded and self.accelerator.num_processes > 1
        self.group: Any = torch.distributed.new_group(backend="gloo") if several else None
        self._pending: _Pending | None = None
        self._measuring = ThreadPoolExecutor(1)

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint atomically and deletes those that are not kept.

        A sharded checkpoint is only started, after the one before it has been finished.

        Raises:
            UserError: on all ranks, if it cannot be written; earlier checkpoints stay intact.
        """
        folder = checkpoint_folder(self.run, progress.iteration)
        if self.sharded:
            self._start(folder, copy.copy(progress))
            return
        with self._writing(folder):
            if self.accelerator.is_main_process:
                self._write(folder, progress)

    @property
    def written(self) -> bool:
        """Whether this rank is writing nothing in the background."""
        return self._pending is None or self._pending.future.done()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if any, and publishes it.

        Raises:
            UserError: on all ranks, if it cannot be written; earlier checkpoints stay intact.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        folder = checkpoint_folder(self.run, pending.progress.iteration)
        own: Checksums = {}
        with self._writing(folder):
            try:
                own = pending.future.result()
            except (CheckpointException, RuntimeError) as error:
                raise OSError(reason_of(error)) from error
        files = {k: v for part in of_all_ranks(self.accelerator, own) for k, v in part.items()}
        with self._writing(folder):
            if self.accelerator.is_main_process:
                write_state(pending.temporary, pending.progress, files)
                publish_folder(pending.temporary, folder)
                self._prune(pending.progress)

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        what = f"checkpoint {folder.name}"
        with raise_on_all_ranks(self.accelerator), writing(self.run, what):
            yield

    def _prune(self, progress: Progress) -> None:
        prune(self.run, self.state.config.checkpoints, progress.iteration)

    def _start(self, folder: Path, progress: Progress) -> None:
        self.finish()
        temporary = folder.parent / f".{folder.name}.{SHARDS}.tmp"
        with self._writing(folder):
            if self.accelerator.is_main_process:
                check_publication()
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / SHARDS).mkdir(parents=True)
                keep_metrics(self.run, temporary)
        future = async_save(
            self.state.tensors(),
            checkpoint_id=temporary / SHARDS,
            process_group=self.group,
            no_dist=self.group is None,
        )
        assert isinstance(future, Future)
        measured = self._measuring.submit(self._measured, future, temporary)
        self._pending = _Pending(measured, progress, temporary)

    def _measured(self, written: Future[Any], temporary: Path) -> Checksums:
        """The checksums of the files that this rank writes, once ``written``."""
        written.result()
        own = (temporary / SHARDS).glob(f"__{self.accelerator.process_index}_*")
        return checksums_of(own, temporary)

    def _write(self, folder: Path, progress: Progress) -> None:
        state = self.state
        with atomic_folder(folder) as temporary:
            self._write_weights(temporary, "")
            states = {n: s.contiguous() for n, s in state.optimizer_states().items()}
            save_file(states, temporary / "optimizer.safetensors")
            if state.old is not None:
                save_file(state.old_weights, temporary / "old_policy.safetensors")
            if state.ema is not None:
                averages: dict[str, Any] = dict(state.averages)
                averages["optimization_step"] = torch.tensor(state.ema.optimization_step)
                save_file(averages, temporary / "ema.safetensors")
                with state.averaged():
                    self._write_weights(temporary, "ema_")
            keep_metrics(self.run, temporary)
            write_state(temporary, progress)
        self._prune(progress)

    def _write_weights(self, folder: Path, prefix: str) -> None:
        policy = self.state.weights.policy
        with self.state.weights.exact():
            if self.state.config.lora is None:
                policy.save_transformer(folder / f"{prefix}transformer")
            else:
                policy.save_lora(folder / f"{prefix}lora")
