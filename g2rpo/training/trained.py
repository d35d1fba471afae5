"""The weights that a run has trained, for sampling and for others."""

import shutil
from pathlib import Path

from g2rpo.errors import UserError
from g2rpo.policy import FluxPolicy, export_pipeline
from g2rpo.policy.folder import read_json
from g2rpo.training.background import SHARDS, read_shards
from g2rpo.training.checkpoints import latest_checkpoint
from g2rpo.training.loop import load_train_config


def load_trained(policy: FluxPolicy, run: Path) -> Path:
    """Lays what ``run`` has trained over ``policy``, which is of its base: the average, where kept.

    Args:
        policy: without adapters; of a run with adapters it gets them.
        run: a run folder, of whole, sharded or LoRA checkpoints.

    Returns:
        The checkpoint that was read: the newest sound one.

    Raises:
        UserError: there is none, or it is of another base.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise UserError(f"{run}: no checkpoint; train this cell first")
    if (checkpoint / SHARDS).is_dir():
        _load_shards(policy, checkpoint)
        return checkpoint
    for name, load in (("transformer", policy.load_transformer), ("lora", policy.load_lora)):
        for folder in (checkpoint / f"ema_{name}", checkpoint / name):
            if folder.is_dir():
                load(folder)
                return checkpoint
    raise UserError(f"{checkpoint}: holds no weights; delete this checkpoint")


def _load_shards(policy: FluxPolicy, checkpoint: Path) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    saved = FileSystemReader(checkpoint / SHARDS).read_metadata().state_dict_metadata
    kind = "ema" if "ema.optimization_step" in saved else "weights"
    parameters = dict(policy.transformer.named_parameters())
    read_shards(checkpoint, {f"{kind}.{name}": p.detach() for name, p in parameters.items()})


def export_trained(run: Path, output: Path) -> str:
    """Writes what ``run`` has trained as diffusers has it, in the policy's dtype.

    Full fine-tuning gives a FluxPipeline folder, adapters a LoRA file that
    ``FluxPipeline.load_lora_weights`` loads over the base.

    Returns:
        What was written, in words.

    Raises:
        UserError: ``run`` is no run folder or has no checkpoint, or ``output`` holds its base.
    """
    config = load_train_config(read_json(run / "config.json"), str(run / "config.json"))
    policy = FluxPolicy.load(config.policy, "cpu")
    checkpoint = load_trained(policy, run)
    if policy.has_lora:
        lora = "ema_lora" if (checkpoint / "ema_lora").is_dir() else "lora"
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(checkpoint / lora, output, dirs_exist_ok=True)
        return f"LoRA file of {checkpoint.name}"
    export_pipeline(policy, output)
    return f"FluxPipeline folder of {checkpoint.name}"
