"""Writes checkpoints: complete ones in safetensors, or sharded ones in the background."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from g2rpo.files import atomic_folder
from g2rpo.training.checkpoint.async_checkpoint import BackgroundWriter
from g2rpo.training.checkpoint.folder import (
    Progress,
    checkpoint_folder,
    prune,
    write_state,
    writing,
)
from g2rpo.training.checkpoint.state import TrainingState
from g2rpo.training.collective import raise_on_all_ranks
from g2rpo.training.metrics import keep_metrics


class CheckpointWriter:
    """Saves a training's state; all ranks call everything here together.

    Attributes:
        state: what is saved.
        background: writes sharded checkpoints; None where the first rank writes complete ones.
    """

    def __init__(self, state: TrainingState) -> None:
        self.state = state
        self.background: BackgroundWriter | None = None
        if state.config.execution.sharding == "fsdp2":
            self.background = BackgroundWriter(
                state.run, state.config.checkpoints, state.accelerator
            )

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint, atomically, and deletes what is not kept; a sharded one is begun.

        Raises:
            UserError: on all ranks, where one cannot be written; those before stay intact.
        """
        if self.background is not None:
            self.background.start(self.state.tensors(), copy.copy(progress))
            return
        folder = checkpoint_folder(self.state.run, progress.iteration)
        what = f"checkpoint {folder.name}"
        with raise_on_all_ranks(self.state.accelerator), writing(self.state.run, what):
            if self.state.accelerator.is_main_process:
                self._write(folder, progress)

    @property
    def written(self) -> bool:
        """Whether nothing is being written in the background by this rank."""
        return self.background is None or self.background.written

    def finish(self) -> None:
        """Waits for what is being written in the background.

        Raises:
            UserError: on all ranks, where it cannot be written.
        """
        if self.background is not None:
            self.background.finish()

    def _write(self, folder: Path, progress: Progress) -> None:
        state = self.state
        with atomic_folder(folder) as temporary:
            self._write_weights(temporary, "")
            states = {n: s.contiguous() for n, s in state.optimizer_states().items()}
            save_file(states, temporary / "optimizer.safetensors")
            if state.ema is not None:
                averages: dict[str, Any] = dict(state.averages)
                averages["optimization_step"] = torch.tensor(state.ema.optimization_step)
                save_file(averages, temporary / "ema.safetensors")
                with state.averaged():
                    self._write_weights(temporary, "ema_")
            keep_metrics(state.run, temporary)
            write_state(temporary, progress)
        prune(state.run, state.config.checkpoints, progress.iteration)

    def _write_weights(self, folder: Path, prefix: str) -> None:
        policy = self.state.weights.policy
        with self.state.weights.exact():
            if self.state.config.lora is None:
                policy.save_transformer(folder / f"{prefix}transformer")
            else:
                policy.save_lora(folder / f"{prefix}lora")
