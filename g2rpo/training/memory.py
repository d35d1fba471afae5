"""Estimates the GPU memory of a training run before anything is loaded.

Storage per parameter is counted exactly, and activations as :meth:`ModelSize.kept` counts them.
Text encoders are not in memory: the stage before has encoded the prompts (:func:`encoding_bytes`).

A phase's own memory counts only as far as it exceeds that of the backward.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

from g2rpo.errors import UserError
from g2rpo.hub.catalogue import catalogue
from g2rpo.policy.config import LoraConfig, PolicyConfig
from g2rpo.policy.size import DTYPE_BYTES, ModelSize, nfe_per_velocity, published
from g2rpo.rewards.base import RewardConfig
from g2rpo.training.config import TrainConfig

GIB = 2**30
STATE_UNITS = 24
"""Peak memory of a forward without gradients, per state, in block outputs: 17.3 counted for FLUX,
less for SD3 (``tests/unit/test_memory_by_fake_tensors.py``), the rest is a margin."""
WORKING_BYTES = 4 * GIB
"""Margin for latents, decoding, kernel workspaces and fragmentation; not measured."""
USABLE = 0.97
"""Share of a GPU's memory; driver and context take the rest."""
RANKS = (2, 4, 8, 16, 32, 64)
"""Numbers of GPUs tried to find a configuration that fits."""


def gpu_bytes(config: TrainConfig, size: ModelSize, ranks: int) -> dict[str, float]:
    """Bytes per GPU that a run of ``config`` on ``ranks`` GPUs needs, by purpose."""
    computed = DTYPE_BYTES[config.policy.dtype]
    master = max(computed, 4)
    shared = ranks if config.execution.sharding == "fsdp2" else 1
    trained = size.parameters if config.lora is None else size.lora_parameters(config.lora)
    settings = config.optimization
    moment = 1 if settings.optimizer == "adamw_8bit" else master
    parts: dict[str, float] = {}
    if shared > 1:
        # The current and the next block, gathered, one block's gradient, and the gradients of two
        # on their way to the other ranks.
        parts["gathered blocks"] = (3 * computed + 2 * master) * size.largest_block
        parts["weights"] = master * (size.parameters / shared + size.buffers)
    else:
        frozen = size.buffers + (0 if config.lora is None else size.parameters)
        masters = master * trained if master > computed else 0
        parts["weights"] = computed * (frozen + trained) + masters
    parts["gradients"] = master * trained / shared
    parts["optimiser states"] = 2 * moment * trained / shared
    if settings.ema_decay is not None:
        parts["average of the weights"] = master * trained / shared
    if config.old_policy is not None:
        parts["old policy"] = master * trained / shared
    if "base" in config.frozen_policies and config.lora is None:
        parts["frozen base"] = (master if shared > 1 else computed) * trained / shared
    parts["activations"] = _activation_bytes(config, size)
    backward = parts["activations"] + parts.get("gathered blocks", 0.0)
    if shared == 1 and settings.optimizer == "adamw":
        # On a GPU torch keeps the root of the second moment of all parameters at once.
        parts["extra for the optimizer step"] = max(0.0, master * trained - backward)
    rollout = _rollout_bytes(config, size)
    if shared > 1 and config.execution.rollout_weights == "gathered":
        rollout += computed * size.parameters
    parts["extra for rollouts"] = max(0.0, rollout - backward - parts["gradients"])
    if computed * size.parameters > GIB:  # small models need little working memory
        parts["working memory"] = WORKING_BYTES
    if not config.execution.offload.rewards:
        parts["reward models"] = sum(_reward_bytes(term.reward) for term in config.rewards.values())
    return parts


def _reward_bytes(reward: RewardConfig) -> int:
    """The size of a reward model's files: those of its folder, else the catalogue's."""
    if reward.source is not None and Path(reward.source).exists():
        return weights_bytes(Path(reward.source))
    published = catalogue().of_reward(reward.model, reward.source, reward.variant)
    return sum(artifact.size()[0] or 0 for artifact in published)


def _rollout_bytes(config: TrainConfig, size: ModelSize) -> float:
    states = config.execution.rollout_micro_batch
    forwards = nfe_per_velocity(config.policy) * (1 if states == "auto" else states)
    return forwards * STATE_UNITS * size.output_bytes(config.policy)


def _activation_bytes(config: TrainConfig, size: ModelSize) -> float:
    of_blocks = size.kept(config.policy, config.lora)
    each = DTYPE_BYTES[config.policy.dtype] * sum(of_blocks)
    if config.execution.gradient_checkpointing:
        # Every block's input, and one block that is recomputed.
        inputs = len(of_blocks) * size.output_bytes(config.policy)
        each = inputs + DTYPE_BYTES[config.policy.dtype] * max(of_blocks)
    detached = config.guidance.detach_unconditional
    forwards = 1 if detached else nfe_per_velocity(config.trained_policy)
    return forwards * config.execution.training_micro_batch * each


def encoding_bytes(policy: PolicyConfig) -> int:
    """Bytes of the text encoders, which encode one prompt at a time."""
    folder = Path(policy.source).expanduser()
    if folder.is_dir():
        return sum(weights_bytes(part) for part in folder.glob("text_encoder*"))
    return (
        DTYPE_BYTES[policy.dtype]
        * published(policy.source, policy.pipeline).text_encoder_parameters
    )


def check_encoders_fit(policy: PolicyConfig, available: float) -> None:
    """Checks that :func:`encoding_bytes` fit into ``available`` bytes of a GPU.

    Raises:
        UserError: they do not fit.
    """
    need = encoding_bytes(policy)
    if need > USABLE * available:
        raise UserError(
            f"the text encoders need about {need / GIB:.1f} GiB of a GPU, but the GPUs have "
            f"{available / GIB:.1f} GiB; use policy.dtype=bfloat16 or GPUs with more memory"
        )


@functools.cache
def weights_bytes(source: Path) -> int:
    """The size in bytes of the weight files in ``source``, a folder or a file."""
    if source.is_file():
        return source.stat().st_size
    suffixes = (".safetensors", ".bin", ".pt", ".pth")
    return sum(path.stat().st_size for path in source.rglob("*") if path.suffix in suffixes)


def _changes(config: TrainConfig, ranks: int) -> Iterator[tuple[str, TrainConfig, int]]:
    """Changes that need less memory, least invasive first, with their number of ranks."""
    offload = config.execution.offload.model_copy(update={"rewards": True})
    yield "execution.offload.rewards=true", _with(config, "execution", offload=offload), ranks
    small = _with(config, "execution", training_micro_batch=1)
    yield "execution.training_micro_batch=1", small, ranks
    checkpointed = _with(small, "execution", gradient_checkpointing=True)
    yield "also execution.gradient_checkpointing=true", checkpointed, ranks
    packed = _with(checkpointed, "optimization", optimizer="adamw_8bit")
    yield "also optimization.optimizer=adamw_8bit", packed, ranks
    if config.lora is None:
        sharded = _with(checkpointed, "execution", sharding="fsdp2", rollout_weights="auto")
        first = ranks if config.execution.sharding != "fsdp2" else ranks + 1
        for count in RANKS:
            if count >= first:
                yield f"execution.sharding=fsdp2 on {count} GPUs", sharded, count
        adapters = _with(checkpointed, "execution", sharding="replicated")
        yield "lora={}", adapters.model_copy(update={"lora": LoraConfig()}), ranks


def _with(config: TrainConfig, section: str, **changes: object) -> TrainConfig:
    changed = getattr(config, section).model_copy(update=changes)
    return config.model_copy(update={section: changed})


def check_fits(
    config: TrainConfig, size: ModelSize, ranks: int, available: float
) -> dict[str, float]:
    """Checks that :func:`gpu_bytes` fit into ``available`` bytes per GPU, and returns them.

    Raises:
        UserError: they do not fit; names the changes that would.
    """
    parts = gpu_bytes(config, size, ranks)
    need = sum(parts.values())
    if need <= USABLE * available:
        return parts
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    shown = ", ".join(f"{name} {bytes_ / GIB:.1f}" for name, bytes_ in largest)
    fitting, tried = [], [(config, ranks)]
    for setting, changed, count in _changes(config, ranks):
        less = sum(gpu_bytes(changed, size, count).values())
        if (changed, count) not in tried and less <= USABLE * available:
            fitting.append(f"{setting} ({less / GIB:.1f} GiB)")
        tried.append((changed, count))
    raise UserError(
        f"this run needs about {need / GIB:.1f} GiB per GPU, but the GPUs have "
        f"{available / GIB:.1f} GiB (largest: {shown} GiB); use "
        + ("; or ".join(fitting) or "GPUs with more memory")
    )
