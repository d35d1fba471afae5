"""The trained weights, sharded over the ranks by FSDP2: each block of the transformer is a unit.

accelerate applies FSDP2 on accelerators alone. ``fully_shard`` is called here, with accelerate's
ranks, so that a CPU takes the same path.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from g2rpo.policy import FluxPolicy
from g2rpo.training.collective import agree
from g2rpo.training.engine.weights import TrainedWeights

logger = logging.getLogger(__name__)

RolloutWeights = Literal["auto", "gathered", "sharded"]
GATHERING_RESERVE = 12 * 2**30
"""Bytes of a GPU that are left to a rollout's latents and the decoder beside gathered weights."""


def shard(transformer: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shards ``transformer``, which is on the meta device, and gives each rank its part's storage.

    Its parameters stay float32 (or more) and are gathered in ``dtype``; gradients are reduced in
    float32. Inputs are the caller's matter, so that the numbers are those of a plain transformer
    in ``dtype``: FSDP2 would round rotary embeddings too.
    """
    stored = next(transformer.parameters()).dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if stored == dtype else dtype,
        reduce_dtype=stored,
        cast_forward_inputs=False,
    )
    for blocks in ("transformer_blocks", "single_transformer_blocks"):
        for block in transformer.get_submodule(blocks).children():
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(transformer, mesh=mesh, mp_policy=policy)
    transformer.to_empty(device=mesh.device_type)


class ShardedWeights(TrainedWeights):
    """Float32 masters, gradients and optimiser states, each rank its part.

    Every forward gathers the blocks one after the other, so all ranks make the same forwards. In
    :meth:`rollout` they are gathered once where they fit.
    """

    sharded = True

    def __init__(
        self, policy: FluxPolicy, accelerator: Accelerator, rollout_weights: RolloutWeights
    ) -> None:
        """Shards the policy's transformer, which has no weights yet, and reads the base's."""
        ranks, kind = accelerator.num_processes, accelerator.device.type
        self.mesh = init_device_mesh(kind, (ranks,))
        self.rollout_weights = rollout_weights
        self._told = False
        shard(policy.transformer, self.mesh, getattr(torch, policy.config.dtype))
        policy.fill_transformer()
        policy.transformer.requires_grad_(True)
        super().__init__(policy, accelerator)

    def reduce_gradients(self) -> None:
        """Nothing is left to do: each backward reduces its gradients."""

    def clip_gradients(self, max_norm: float) -> float:
        """See :meth:`TrainedWeights.clip_gradients`; the norm is of the whole gradient."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def drop_gradients(self) -> None:
        """See :meth:`TrainedWeights.drop_gradients`."""
        super().drop_gradients()
        for unit in _units(self.policy.transformer):
            unit.reshard()

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Gathers the weights once, where they are to be and fit; gives them back at the end."""
        self.waits = not self._gathers()
        if self.waits:
            yield
            return
        units = _units(self.policy.transformer)
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()
                unit.set_reshard_after_forward(True, recurse=False)

    def _gathers(self) -> bool:
        if self.rollout_weights != "auto":
            return self.rollout_weights == "gathered"
        fits = True
        if self.accelerator.device.type == "cuda":
            dtype: torch.dtype = getattr(torch, self.policy.config.dtype)
            size = sum(parameter.numel() for parameter in self.parameters) * dtype.itemsize
            free, _ = torch.cuda.mem_get_info()
            cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            fits = size + GATHERING_RESERVE <= free + cached
        fits = agree(self.accelerator, fits)
        if not self._told and self.accelerator.is_main_process:
            how = "once a rollout" if fits else "at every forward: whole they do not fit"
            logger.info("sharded weights are gathered %s", how)
        self._told = True
        return fits

    def reference(self) -> FluxPolicy:
        """The base read anew, frozen, sharded as well."""
        reference = copy.copy(self.policy)
        reference.transformer = FluxPolicy.empty_transformer(self.policy.config, self.policy.folder)
        shard(reference.transformer, self.mesh, getattr(torch, self.policy.config.dtype))
        reference.fill_transformer()
        reference.transformer.requires_grad_(False)
        return reference


def _units(transformer: nn.Module) -> list[FSDPModule]:
    return [module for module in transformer.modules() if isinstance(module, FSDPModule)]
