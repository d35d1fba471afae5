"""Loads the policy, holds its weights as a configuration wants them, and makes the optimiser."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from g2rpo.errors import UserError
from g2rpo.policy import FluxPolicy
from g2rpo.policy.kernels import compile_blocks, resolve_attention, set_attention
from g2rpo.training.config import OptimizationConfig, TrainConfig
from g2rpo.training.engine.sharded import ShardedWeights
from g2rpo.training.engine.weights import MasterWeights, TrainedWeights


def build_weights(config: TrainConfig, accelerator: Accelerator) -> TrainedWeights:
    """The policy with its trained weights: ``.policy`` of what is returned.

    One rank has nothing to shard: it holds everything, whatever ``execution.sharding`` says.

    Raises:
        UserError: as :meth:`FluxPolicy.load`, or sharding is asked for what cannot be sharded.
    """
    sharded = config.execution.sharding == "fsdp2"
    if sharded and config.lora is not None:
        raise UserError(
            "execution.sharding: fsdp2 does not go with lora, whose adapters are small; use "
            "execution.sharding: replicated"
        )
    narrow = config.policy.dtype == "bfloat16"
    if sharded and accelerator.num_processes > 1:
        policy = FluxPolicy.load(config.policy, accelerator.device, weights=False)
        policy.transformer.eval()
        if config.execution.compile:
            compile_blocks(policy.transformer)
        weights: TrainedWeights = ShardedWeights(
            policy, accelerator, config.execution.rollout_weights
        )
    else:
        policy = FluxPolicy.load(config.policy, accelerator.device)
        policy.transformer.eval()
        if config.lora is None:
            policy.transformer.requires_grad_(True)
        else:
            policy.add_lora(config.lora, config.seed)
        if config.execution.compile:
            compile_blocks(policy.transformer)
        weights = (MasterWeights if narrow else TrainedWeights)(policy, accelerator)
    policy.offload = config.execution.offload
    if policy.offload.vae:
        policy.vae.to("cpu")
    if config.execution.gradient_checkpointing:
        policy.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    dtype = getattr(torch, config.policy.dtype)
    chosen = resolve_attention(config.execution.attention, accelerator.device, dtype)
    set_attention(policy.transformer, chosen)
    return weights


def build_optimizer(
    settings: OptimizationConfig, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW with whole or 8-bit states.

    Raises:
        UserError: 8-bit states are asked for and torchao is not installed.
    """
    kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    if settings.optimizer == "adamw_8bit":
        try:
            from torchao.optim import AdamW8bit  # optional, and slow to import
        except ImportError:
            raise UserError(
                "optimization.optimizer: adamw_8bit needs torchao, which is not installed: "
                "`pip install torchao`, or use adamw"
            ) from None
        kind = AdamW8bit
    return kind(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
