"""Loads the policy and holds its weights as a configuration wants it."""

import torch
from accelerate import Accelerator

from g2rpo.errors import UserError
from g2rpo.policy import FluxPolicy
from g2rpo.policy.kernels import compile_blocks, resolve_attention, set_attention
from g2rpo.training.config import TrainConfig
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
