"""How much of a GPU's memory a training run needs, told before anything is loaded.

What is counted exactly is what is stored for every parameter. Activations are counted in units of
one block's output (tokens times width): 12.5 of them for each block under LoRA, from 34.0 GiB
against 24.6 GiB measured on FLUX.1-dev at 720x720 without and with checkpointing, and 18 with
full fine-tuning, which keeps the inputs of all linear layers (by counting, not measured).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from g2rpo.errors import UserError
from g2rpo.policy import FluxPolicy
from g2rpo.policy.config import LoraConfig
from g2rpo.policy.folder import read_json, resolve_source
from g2rpo.training.config import TrainConfig

GIB = 2**30
LORA_UNITS, FULL_UNITS = 12.5, 18.0
"""Activations kept for a block's backward, in block outputs, without checkpointing."""
WORKING_BYTES = 4 * GIB
"""Allowance for latents, decoding, kernels' workspaces and fragmentation; not measured."""
USABLE = 0.97
"""Of a GPU's memory; the rest is the driver's and the context's."""
RANKS = (2, 4, 8, 16, 32, 64)
"""Numbers of GPUs that are tried when something is to fit."""


@dataclass(frozen=True)
class Sizes:
    """What of a transformer and its work memory depends on.

    Attributes:
        parameters: of the whole transformer.
        largest_block: parameters of its largest block.
        blocks: how many blocks.
        width: of the tokens in them.
        tokens: image and text tokens of one state.
        linears: (name, inputs, outputs) of every linear layer, for the adapters.
    """

    parameters: int
    largest_block: int
    blocks: int
    width: int
    tokens: int
    linears: tuple[tuple[str, int, int], ...]

    def adapters(self, config: LoraConfig) -> int:
        """Parameters of the adapters of ``config``."""
        return sum(
            config.rank * (inputs + outputs)
            for name, inputs, outputs in self.linears
            if name.endswith(config.target_modules)
        )


def transformer_sizes(config: TrainConfig) -> Sizes:
    """The sizes of the configured policy, from its configuration files alone.

    Raises:
        UserError: the policy cannot be found.
    """
    folder = resolve_source(config.policy.source, config.policy.revision)
    transformer = FluxPolicy.empty_transformer(config.policy, folder)
    blocks = [
        *transformer.get_submodule("transformer_blocks").children(),
        *transformer.get_submodule("single_transformer_blocks").children(),
    ]
    settings = dict(transformer.config)
    vae = read_json(folder / "vae" / "config.json")
    side = config.policy.resolution // 2 ** (len(vae["block_out_channels"]) - 1) // 2
    return Sizes(
        parameters=_parameters(transformer),
        largest_block=max((_parameters(block) for block in blocks), default=0),
        blocks=len(blocks),
        width=settings["attention_head_dim"] * settings["num_attention_heads"],
        tokens=side**2 + config.policy.max_sequence_length,
        linears=tuple(
            (name, module.in_features, module.out_features)
            for name, module in transformer.named_modules()
            if isinstance(module, nn.Linear)
        ),
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def estimate(config: TrainConfig, sizes: Sizes, ranks: int) -> dict[str, float]:
    """Bytes of each GPU that a run of ``config`` on ``ranks`` of them needs, by what they hold."""
    computed = getattr(torch, config.policy.dtype).itemsize
    master = max(computed, 4)
    shared = ranks if config.execution.sharding == "fsdp2" else 1
    trained = sizes.parameters if config.lora is None else sizes.adapters(config.lora)
    settings = config.optimization
    moments = 2 * (1 if settings.optimizer == "adamw_8bit" else master)
    parts: dict[str, float] = {}
    if shared > 1:
        # The block at work and the next, gathered, and the gradient of one.
        parts["gathered blocks"] = 3 * computed * sizes.largest_block
        parts["weights"] = master * sizes.parameters / shared
    else:
        frozen = 0 if config.lora is None else sizes.parameters
        masters = master * trained if master > computed else 0
        parts["weights"] = computed * (frozen + trained) + masters
    parts["gradients"] = master * trained / shared
    parts["optimiser states"] = moments * trained / shared
    if settings.ema_decay is not None:
        parts["average of the weights"] = master * trained / shared
    if settings.kl_coefficient > 0 and config.lora is None:
        parts["frozen base"] = (master if shared > 1 else computed) * trained / shared
    parts["activations"] = _activations(config, sizes, computed)
    if shared > 1 and config.execution.rollout_weights == "gathered":
        # Not at the same time as a backward's activations.
        beside = parts["activations"] + parts["gathered blocks"]
        parts["gathered for rollouts"] = max(0.0, computed * sizes.parameters - beside)
    if computed * sizes.parameters > GIB:  # what is small has small working memory too
        parts["working memory"] = WORKING_BYTES
    return parts


def _activations(config: TrainConfig, sizes: Sizes, computed: int) -> float:
    unit = sizes.tokens * sizes.width * computed
    kept = FULL_UNITS if config.lora is None else LORA_UNITS
    # With checkpointing: every block's input, and one block that is computed again.
    checkpointed = config.execution.gradient_checkpointing
    units = sizes.blocks + kept if checkpointed else sizes.blocks * kept
    return config.execution.training_micro_batch * units * unit


def alternatives(config: TrainConfig, sizes: Sizes, ranks: int, available: float) -> list[str]:
    """What would fit into ``available`` bytes a GPU, mildest first: settings and their need."""
    found = []
    for setting, changed, count in _changes(config, ranks):
        need = sum(estimate(changed, sizes, count).values())
        if need <= available:
            found.append(f"{setting} ({need / GIB:.1f} GiB)")
    return found


def _changes(config: TrainConfig, ranks: int) -> Iterable[tuple[str, TrainConfig, int]]:
    """Changed configurations, each added to the one before, and their ranks."""
    small = _with(config, "execution", training_micro_batch=1)
    if config.execution.training_micro_batch > 1:
        yield "execution.training_micro_batch=1", small, ranks
    checkpointed = _with(small, "execution", gradient_checkpointing=True)
    if not config.execution.gradient_checkpointing:
        yield "also execution.gradient_checkpointing=true", checkpointed, ranks
    packed = _with(checkpointed, "optimization", optimizer="adamw_8bit")
    if config.optimization.optimizer != "adamw_8bit":
        yield "also optimization.optimizer=adamw_8bit", packed, ranks
    if config.lora is not None:
        return
    sharded = _with(checkpointed, "execution", sharding="fsdp2", rollout_weights="auto")
    for count in RANKS:
        if count > ranks or (count == ranks and config.execution.sharding != "fsdp2"):
            yield f"execution.sharding=fsdp2 on {count} GPUs", sharded, count
    adapters = _with(checkpointed, "execution", sharding="replicated")
    yield "lora={}", adapters.model_copy(update={"lora": LoraConfig()}), ranks


def _with(config: TrainConfig, section: str, **changes: object) -> TrainConfig:
    changed = getattr(config, section).model_copy(update=changes)
    return config.model_copy(update={section: changed})


def check_fits(
    config: TrainConfig, ranks: int, available: float, rewards: float = 0.0
) -> dict[str, float]:
    """The estimate, where it fits into ``available`` bytes of each GPU.

    Args:
        config: the run.
        ranks: GPUs.
        available: bytes of each.
        rewards: bytes of the reward models while training, where they stay on the GPU.

    Raises:
        UserError: it does not; with what would.
    """
    sizes = transformer_sizes(config)
    parts = estimate(config, sizes, ranks)
    if rewards and not config.execution.offload.rewards:
        parts["reward models"] = rewards
    usable = USABLE * available
    need = sum(parts.values())
    if need <= usable:
        return parts
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    fitting = alternatives(config, sizes, ranks, usable - parts.get("reward models", 0.0))
    if "reward models" in parts and need - rewards <= usable:
        fitting.insert(0, "execution.offload.rewards=true")
    mend = "; or ".join(fitting) if fitting else "GPUs with more memory"
    raise UserError(
        f"this run needs about {need / GIB:.1f} GiB of each GPU, which has "
        f"{available / GIB:.1f} GiB (largest: {shown} GiB); what would fit: {mend}"
    )


def reward_bytes(config: TrainConfig) -> int:
    """The bytes of the reward models that are trained on, of those that are files here."""
    sources = [Path(term.reward.source or "") for term in config.rewards.values()]
    return sum(weights_bytes(source) for source in sources if source.name)


def weights_bytes(folder: Path) -> int:
    """The bytes of all weight files below ``folder``, which is a folder or one file."""
    if folder.is_file():
        return folder.stat().st_size
    suffixes = (".safetensors", ".bin", ".pt", ".pth")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in suffixes)
