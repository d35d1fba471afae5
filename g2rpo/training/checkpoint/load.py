"""Reads checkpoints to resume a training, to sample from trained weights, or to export them.

Complete and sharded checkpoints are read at any number of ranks, whichever kind the run writes now.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from g2rpo.checksums import parse_document
from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.files import atomic_folder
from g2rpo.policy import Policy, PolicyConfig, export_pipeline, load_policy
from g2rpo.policy.checkpoint import copy_whole
from g2rpo.policy.export import write_checksums
from g2rpo.training.checkpoint.folder import (
    SHARDS,
    Progress,
    latest_checkpoint,
    newest_checkpoint,
    problem,
    read_progress,
    remove_unfinished,
    writing,
)
from g2rpo.training.checkpoint.save import reason_of
from g2rpo.training.checkpoint.state import TrainingState
from g2rpo.training.collective import of_all_ranks, raise_on_all_ranks
from g2rpo.training.metrics import METRICS_FILE, restore_metrics

logger = logging.getLogger(__name__)


def resume(state: TrainingState, group: Any = None) -> Progress:
    """Restores the newest undamaged checkpoint, if any, with its metrics; returns how far it is.

    ``group`` is the process group that reads sharded weights; None reads in each process alone.

    Raises:
        UserError: a checkpoint cannot be read, or holds weights other than those trained now.
    """
    ranks = state.accelerator

    def shared_problem(folder: Path) -> str | None:
        own = problem(folder, slice(ranks.process_index, None, ranks.num_processes))
        return next((one for one in of_all_ranks(ranks, own) if one is not None), None)

    folder = latest_checkpoint(state.run, shared_problem)
    with raise_on_all_ranks(ranks), writing(state.run, METRICS_FILE):
        if ranks.is_main_process:
            remove_unfinished(state.run)
            restore_metrics(state.run, folder)
    if folder is None:
        return Progress()
    if (folder / SHARDS).is_dir():
        state.fill_optimizer(None)
        tensors = state.tensors()
        _read_shards(folder, tensors, group)
        state.repack_optimizer(tensors)
        average_steps = tensors.get("ema.optimization_step")
    else:
        average_steps = _read_whole(state, folder)
    if state.ema is not None and average_steps is not None:
        state.ema.optimization_step = int(average_steps)
    state.weights.updated()
    progress = read_progress(folder)
    logger.info("resuming from iteration %d", progress.iteration)
    return progress


def _read_whole(state: TrainingState, folder: Path) -> Tensor | None:
    """Reads a complete checkpoint, whose files have been compared with their checksums.

    Returns the number of EMA steps, if it has an EMA.
    """
    with state.weights.exact():
        if state.config.lora is None:
            state.weights.policy.load_transformer(folder / "transformer")
        else:
            state.weights.policy.load_lora(folder / "lora")
    state.fill_optimizer(load_file(folder / "optimizer.safetensors"))
    if state.old is not None:
        saved = load_file(folder / "old_policy.safetensors")
        for name, own in state.old_weights.items():
            copy_whole(own, saved[name])
    if state.ema is None:
        return None
    tensors = load_file(folder / "ema.safetensors")
    for name, average in state.averages.items():
        copy_whole(average, tensors[name])
    return tensors["optimization_step"]


def _read_shards(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Fills ``tensors`` from a sharded checkpoint, however many ranks wrote it.

    Its metadata is a pickle, whose checksum has been verified before (:func:`problem`). Sharded
    tensors get this rank's part; everything else in the checkpoint is ignored.
    """
    try:
        load_distributed(
            dict(tensors),
            checkpoint_id=folder / SHARDS,
            process_group=group,
            no_dist=group is None,
        )
    except (CheckpointException, RuntimeError, ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{folder}: cannot be read ({reason_of(error)}); delete this checkpoint to use the one "
            "before it"
        ) from None


def load_trained(policy: Policy, run: Path) -> Path:
    """Loads what ``run`` has trained into ``policy``, its base: the EMA if there is one.

    Adds adapters if the run trained adapters. Returns the checkpoint that was read, the newest.

    Raises:
        UserError: there is none, or it is damaged or belongs to another base.
    """
    checkpoint = newest_checkpoint(run)
    if (checkpoint / SHARDS).is_dir():
        saved = FileSystemReader(checkpoint / SHARDS).read_metadata().state_dict_metadata
        kind = "ema" if "ema.optimization_step" in saved else "weights"
        parameters = policy.transformer.named_parameters()
        _read_shards(checkpoint, {f"{kind}.{name}": p.detach() for name, p in parameters})
        return checkpoint
    for name, load in (("transformer", policy.load_transformer), ("lora", policy.load_lora)):
        for folder in (checkpoint / f"ema_{name}", checkpoint / name):
            if folder.is_dir():
                load(folder)
                return checkpoint
    raise UserError(f"{checkpoint}: no weights found; delete this checkpoint")


def export_trained(run: Path, output: Path) -> str:
    """Writes what ``run`` has trained in diffusers' format, in the policy's dtype.

    Full fine-tuning gives a folder of the policy's pipeline, LoRA a file for its
    ``load_lora_weights``.

    Returns:
        What was written, in words.

    Raises:
        UserError: ``run`` is not a run folder or has no checkpoint, or ``output`` holds its base.
    """
    path = run / "config.json"
    try:
        settings = parse_document(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is it a run folder?") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); train this cell again") from None
    # Only the base is validated: other settings may have other names in runs of older versions.
    policy = load_policy(validate(PolicyConfig, settings.get("policy"), str(path)), "cpu")
    checkpoint = load_trained(policy, run)
    if policy.has_lora:
        lora = "ema_lora" if (checkpoint / "ema_lora").is_dir() else "lora"
        with atomic_folder(output) as temporary:
            shutil.copytree(checkpoint / lora, temporary, dirs_exist_ok=True)
            write_checksums(temporary)
        return f"LoRA file of {checkpoint.name}"
    export_pipeline(policy, output)
    return f"{policy.pipeline_class.__name__} folder of {checkpoint.name}"
