"""All that a run is gone on with: trained weights, optimiser, their average, and how far it is.

Two kinds of checkpoints: whole ones in safetensors, with the weights as diffusers has them, and
sharded ones, one part for each rank that wrote them. Either is read whichever the run now writes,
at any number of ranks.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.files import atomic_folder
from g2rpo.policy.checkpoint import copy_whole
from g2rpo.training.checkpoint import checkpoints
from g2rpo.training.checkpoint.async_checkpoint import SHARDS, BackgroundWriter, read_shards
from g2rpo.training.checkpoint.checkpoints import Progress
from g2rpo.training.collective import of_all_ranks, raise_on_all_ranks
from g2rpo.training.config import TrainConfig
from g2rpo.training.engine import TrainedWeights
from g2rpo.training.engine.optimizer import fill_states, unpacked, write_back
from g2rpo.training.metrics import METRICS_FILE, keep_metrics, restore_metrics

logger = logging.getLogger(__name__)


class TrainingState:
    """Saves and restores; all ranks call everything here together.

    Attributes:
        weights: the trained weights.
        optimizer: their optimiser.
        ema: their running average; None where none is kept.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        weights: TrainedWeights,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.config, self.run, self.weights, self.optimizer = config, run, weights, optimizer
        self.accelerator: Accelerator = weights.accelerator
        decay = config.optimization.ema_decay
        self.ema = None if decay is None else EMAModel(weights.parameters, decay=decay)
        self._writer: BackgroundWriter | None = None
        if config.execution.sharding == "fsdp2":
            self._writer = BackgroundWriter(run, config.checkpoints, self.accelerator)

    # Saving

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint, atomically, and deletes what is not kept; a sharded one is begun.

        Raises:
            UserError: on all ranks, where one cannot be written; those before stay intact.
        """
        if self._writer is not None:
            self._writer.start(self._tensors(), copy.copy(progress))
            return
        error = None
        if self.accelerator.is_main_process:
            folder = checkpoints.checkpoint_folder(self.run, progress.iteration)
            try:
                with checkpoints.writing(self.run, f"checkpoint {folder.name}"):
                    self._write_whole(folder, progress)
            except UserError as found:
                error = found
        raise_on_all_ranks(self.accelerator, error)

    @property
    def written(self) -> bool:
        """Whether nothing is being written in the background by this rank."""
        return self._writer is None or self._writer.written

    def finish(self) -> None:
        """Waits for what is being written in the background.

        Raises:
            UserError: on all ranks, where it cannot be written.
        """
        if self._writer is not None:
            self._writer.finish()

    def _write_whole(self, folder: Path, progress: Progress) -> None:
        with atomic_folder(folder) as temporary:
            self._save_weights(temporary, "")
            optimizer = temporary / "optimizer.safetensors"
            _save_optimizer(optimizer, self.optimizer, self.weights.named)
            if self.ema is not None:
                names = [name for name, _ in self.weights.named]
                shadow: dict[str, Any] = dict(zip(names, self.ema.shadow_params, strict=True))
                shadow["optimization_step"] = torch.tensor(self.ema.optimization_step)
                save_file(shadow, temporary / "ema.safetensors")
                with self._averaged():
                    self._save_weights(temporary, "ema_")
            keep_metrics(self.run, temporary)
            checkpoints.write_state(temporary, progress)
        checkpoints.prune(self.run, self.config.checkpoints, progress.iteration)

    def _save_weights(self, folder: Path, prefix: str) -> None:
        policy = self.weights.policy
        with self.weights.exact():
            if self.config.lora is None:
                policy.save_transformer(folder / f"{prefix}transformer")
            else:
                policy.save_lora(folder / f"{prefix}lora")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside of the block the trained weights are their running average."""
        assert self.ema is not None
        self.ema.store(self.weights.parameters)
        self.ema.copy_to(self.weights.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.weights.parameters)

    # Resuming

    def resume(self) -> Progress:
        """Restores the newest undamaged checkpoint, if there is one; says how far the run is.

        The metrics are restored with it.

        Raises:
            UserError: a checkpoint cannot be read, or is of other weights than are trained now.
        """
        folder = checkpoints.latest_checkpoint(self.run, self._problem)
        error = None
        if self.accelerator.is_main_process:
            try:
                checkpoints.remove_unfinished(self.run)
                with checkpoints.writing(self.run, METRICS_FILE):
                    restore_metrics(self.run, folder)
            except UserError as found:
                error = found
        raise_on_all_ranks(self.accelerator, error)
        if folder is None:
            return Progress()
        if (folder / SHARDS).is_dir():
            self._read_shards(folder)
        else:
            self._read_whole(folder)
        self.weights.updated()
        progress = checkpoints.read_progress(folder)
        logger.info("resuming after iteration %d", progress.iteration)
        return progress

    def _problem(self, folder: Path) -> str | None:
        """As :func:`checkpoints.problem`; the ranks share the reading."""
        ranks = self.accelerator
        own = checkpoints.problem(folder, slice(ranks.process_index, None, ranks.num_processes))
        return next((one for one in of_all_ranks(ranks, own) if one is not None), None)

    def _read_whole(self, folder: Path) -> None:
        with self.weights.exact():
            if self.config.lora is None:
                self.weights.policy.load_transformer(folder / "transformer")
            else:
                self.weights.policy.load_lora(folder / "lora")
        tensors = _load_tensors(folder / "optimizer.safetensors")
        fill_states(self.optimizer, self.weights.named, tensors)
        if self.ema is not None:
            tensors = _load_tensors(folder / "ema.safetensors")
            for (name, _), shadow in zip(self.weights.named, self.ema.shadow_params, strict=True):
                copy_whole(shadow, tensors[name])
            self.ema.optimization_step = int(tensors["optimization_step"])

    def _read_shards(self, folder: Path) -> None:
        fill_states(self.optimizer, self.weights.named, None)
        tensors = self._tensors()
        read_shards(folder, tensors, None if self._writer is None else self._writer.group)
        write_back(self.optimizer, self.weights.named, tensors)
        if self.ema is not None:
            self.ema.optimization_step = int(tensors["ema.optimization_step"])

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a sharded checkpoint holds, by name; shared with what is trained."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.weights.named:
            tensors[f"weights.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = unpacked(value)
        if self.ema is not None:
            for (name, _), shadow in zip(self.weights.named, self.ema.shadow_params, strict=True):
                tensors[f"ema.{name}"] = shadow
            tensors["ema.optimization_step"] = torch.tensor(self.ema.optimization_step)
        return tensors


def _save_optimizer(
    path: Path,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[tuple[str, torch.nn.Parameter]],
) -> None:
    """Writes AdamW's state, each tensor under its parameter's name."""
    tensors = {}
    for name, parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = unpacked(value).contiguous()
    save_file(tensors, path)


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file; :class:`UserError` where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; delete this checkpoint to use the one before") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete this checkpoint to use the one before"
        ) from None
