"""The weights that a run has trained, for sampling and for others."""

import shutil
from pathlib import Path

from g2rpo.checksums import parse_document
from g2rpo.errors import UserError
from g2rpo.files import atomic_folder
from g2rpo.policy import FluxPolicy, export_pipeline
from g2rpo.policy.export import write_checksums
from g2rpo.training.checkpoint.async_checkpoint import SHARDS, read_shards
from g2rpo.training.checkpoint.checkpoints import checkpoint_folder, problem, saved_iterations
from g2rpo.training.loop import load_train_config


def load_trained(policy: FluxPolicy, run: Path) -> Path:
    """Lays what ``run`` has trained over ``policy``, which is of its base: the average, where kept.

    Args:
        policy: without adapters; of a run with adapters it gets them.
        run: a run folder, of whole, sharded or LoRA checkpoints.

    Returns:
        The checkpoint that was read: the newest.

    Raises:
        UserError: there is none, or it is damaged or of another base.
    """
    iterations = saved_iterations(run)
    if not iterations:
        raise UserError(f"{run}: no checkpoint; train this cell first")
    checkpoint = checkpoint_folder(run, iterations[-1])
    found = problem(checkpoint)
    if found is not None:  # the one before it would be of another policy than the run's
        raise UserError(f"{checkpoint}: {found}; train this cell again, which repairs it")
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
    path = run / "config.json"
    try:
        settings = parse_document(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is it a run folder?") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); train this cell again") from None
    config = load_train_config(settings, str(path))
    policy = FluxPolicy.load(config.policy, "cpu")
    checkpoint = load_trained(policy, run)
    if policy.has_lora:
        lora = "ema_lora" if (checkpoint / "ema_lora").is_dir() else "lora"
        with atomic_folder(output) as temporary:
            shutil.copytree(checkpoint / lora, temporary, dirs_exist_ok=True)
            write_checksums(temporary)
        return f"LoRA file of {checkpoint.name}"
    export_pipeline(policy, output)
    return f"FluxPipeline folder of {checkpoint.name}"
