"""How the trained weights are held and stepped: as they are, with float32 masters, or sharded.

Sharding is FSDP2, each block of the transformer a unit. accelerate applies it on accelerators only;
``fully_shard`` is called here, with accelerate's ranks, so that a CPU takes the same path.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from g2rpo.errors import UserError
from g2rpo.policy import Policy, load_policy
from g2rpo.policy.kernels import compile_blocks, resolve_attention, set_attention
from g2rpo.training.collective import of_all_ranks
from g2rpo.training.config import OptimizationConfig, TrainConfig

logger = logging.getLogger(__name__)

GATHERING_RESERVE = 12 * 2**30
"""Bytes of a GPU kept free for a rollout's latents and the decoder beside gathered weights."""


class TrainedWeights:
    """The transformer's trainable parameters, computed with and stepped in one dtype.

    No gradient crosses ranks before :meth:`reduce_gradients`, so a rank that runs out of memory
    never leaves the others waiting.

    Attributes:
        named: the parameters that the optimiser steps, by the transformer's own names.
    """

    sharded = False
    """Whether ranks wait for each other within a forward."""
    waits = False
    """Whether they do so in the current rollout."""

    def __init__(self, policy: Policy, accelerator: Accelerator) -> None:
        self.policy, self.accelerator = policy, accelerator
        self.computed = [
            (n, p) for n, p in policy.transformer.named_parameters() if p.requires_grad
        ]
        self.named = self.computed

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimiser steps."""
        return [parameter for _, parameter in self.named]

    def reduce_gradients(self) -> None:
        """Averages the gradients of all micro-batches over the ranks."""
        ranks = self.accelerator.num_processes
        if ranks == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(ranks)
                torch.distributed.all_reduce(parameter.grad)

    def clip_gradients(self, max_norm: float) -> float:
        """Clips the gradient's norm (of the whole gradient) and returns the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def drop_gradients(self) -> None:
        """Clears all gradients, including those of an interrupted backward."""
        for _, parameter in (*self.named, *self.computed):
            parameter.grad = None

    def updated(self) -> None:
        """Makes the transformer compute with the new values of ``named``."""

    @contextmanager
    def exact(self) -> Iterator[None]:
        """For saving and loading: the transformer holds the optimiser's own parameters."""
        yield

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """A block of many forwards without gradients."""
        yield

    def reference(self) -> Policy:
        """The policy with a frozen copy of the transformer before training."""
        reference = copy.copy(self.policy)
        reference.transformer = copy.deepcopy(self.policy.transformer)
        reference.transformer.requires_grad_(False)
        return reference


class MasterWeights(TrainedWeights):
    """Parameters stepped in float32 and computed with in a narrower dtype.

    At a learning rate of 1e-6 most steps are below the rounding of bfloat16 and would be lost.
    Gradients are summed over micro-batches in float32 too.
    """

    def __init__(self, policy: Policy, accelerator: Accelerator) -> None:
        super().__init__(policy, accelerator)
        dtype = getattr(torch, policy.config.dtype)
        self.named = [
            (name, nn.Parameter(parameter.detach().to(torch.float32, copy=True)))
            for name, parameter in self.computed
        ]
        for (_, computed), (_, master) in zip(self.computed, self.named, strict=True):
            computed.data = computed.data.to(dtype)
            computed.register_post_accumulate_grad_hook(_add_to(master))

    def updated(self) -> None:
        """Rounds the masters into the transformer's parameters."""
        with torch.no_grad():
            for (_, computed), (_, master) in zip(self.computed, self.named, strict=True):
                computed.copy_(master)

    @contextmanager
    def exact(self) -> Iterator[None]:
        rounded = [computed.data for _, computed in self.computed]
        for (_, computed), (_, master) in zip(self.computed, self.named, strict=True):
            computed.data = master.data
        try:
            yield
        finally:
            for (_, computed), data in zip(self.computed, rounded, strict=True):
                computed.data = data


def _add_to(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """A hook that moves a parameter's gradient to its master."""

    def move(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad.add_(gradient)
        parameter.grad = None

    return move


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Shards the policy's transformer, which is on the meta device, and allocates this rank's part.

    Parameters stay float32 (or wider) and are gathered in the policy's dtype; gradients are reduced
    in float32. Inputs are not cast: FSDP2 would round rotary embeddings too, which a plain
    transformer in that dtype does not.
    """
    transformer, dtype = policy.transformer, getattr(torch, policy.config.dtype)
    stored = next(transformer.parameters()).dtype
    precision = MixedPrecisionPolicy(
        param_dtype=None if stored == dtype else dtype,
        reduce_dtype=stored,
        cast_forward_inputs=False,
    )
    for blocks in policy.block_lists:
        for block in transformer.get_submodule(blocks).children():
            fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(transformer, mesh=mesh, mp_policy=precision)
    transformer.to_empty(device=mesh.device_type)


class ShardedWeights(TrainedWeights):
    """Float32 masters, gradients and optimiser states, sharded over the ranks.

    Every forward gathers the blocks one by one, so all ranks must make the same forwards.
    :meth:`rollout` gathers them once if they fit.
    """

    sharded = True

    def __init__(self, policy: Policy, accelerator: Accelerator, rollout_weights: str) -> None:
        """Shards the policy's transformer, which has no weights yet, and reads the base's."""
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.rollout_weights = rollout_weights
        self._logged = False
        shard(policy, self.mesh)
        policy.fill_transformer()
        policy.transformer.requires_grad_(True)
        super().__init__(policy, accelerator)

    def reduce_gradients(self) -> None:
        """Does nothing: each backward reduces its gradients."""

    def drop_gradients(self) -> None:
        super().drop_gradients()
        self.updated()

    def updated(self) -> None:
        """Drops gathered weights: the root's stay gathered after a forward without a backward."""
        for unit in _units(self.policy.transformer):
            unit.reshard()

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Gathers the weights once if they fit, and reshards them at the end."""
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
            fits = size + GATHERING_RESERVE <= free_bytes(self.accelerator.device)
        fits = all(of_all_ranks(self.accelerator, fits))
        if not self._logged and self.accelerator.is_main_process:
            how = "once per rollout" if fits else "at every forward: they do not fit whole"
            logger.info("gathering sharded weights %s", how)
        self._logged = True
        return fits

    def reference(self) -> Policy:
        """The base, read again, frozen and sharded."""
        reference = copy.copy(self.policy)
        reference.transformer = reference.empty_transformer(reference.config, reference.folder)
        shard(reference, self.mesh)
        reference.fill_transformer()
        reference.transformer.requires_grad_(False)
        return reference


def free_bytes(device: torch.device) -> int:
    """The memory of a GPU that is free, or cached by torch and unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _units(transformer: nn.Module) -> list[FSDPModule]:
    return [module for module in transformer.modules() if isinstance(module, FSDPModule)]


def build_weights(config: TrainConfig, accelerator: Accelerator) -> TrainedWeights:
    """Loads the policy (``.policy`` of the result) and its trained weights.

    A single rank has nothing to shard and holds everything, whatever ``execution.sharding`` says.

    Raises:
        UserError: as :meth:`Policy.load`, or the attention kernel cannot be chosen for this
            architecture.
    """
    execution, device = config.execution, accelerator.device
    sharded = execution.sharding == "fsdp2" and accelerator.num_processes > 1
    policy = load_policy(config.policy, device, weights=not sharded)
    if execution.attention not in ("auto", "native") and not policy.has_attention_backends:
        raise UserError(
            f"execution.attention={execution.attention} is not supported for a "
            f"{policy.pipeline_class.__name__}; use auto"
        )
    policy.transformer.eval()
    if config.lora is not None:
        policy.add_lora(config.lora, config.seed)
    elif not sharded:
        policy.transformer.requires_grad_(True)
    if execution.compile:
        compile_blocks(policy.transformer)
    if sharded:
        weights: TrainedWeights = ShardedWeights(policy, accelerator, execution.rollout_weights)
    else:
        narrow = config.policy.dtype == "bfloat16"
        weights = (MasterWeights if narrow else TrainedWeights)(policy, accelerator)
    policy.offload = execution.offload
    if policy.offload.vae:
        policy.vae.to("cpu")
    if execution.gradient_checkpointing:
        policy.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    attention = resolve_attention(execution.attention, device, getattr(torch, config.policy.dtype))
    set_attention(policy.transformer, attention)
    return weights


def build_optimizer(
    settings: OptimizationConfig, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW with full or 8-bit states.

    Raises:
        UserError: 8-bit states need torchao, which is not installed.
    """
    kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    if settings.optimizer == "adamw_8bit":
        try:
            from torchao.optim import AdamW8bit  # optional, and slow to import
        except ImportError:
            raise UserError(
                "optimization.optimizer=adamw_8bit needs torchao, which is not installed; run "
                "`.uv/bin/uv pip install torchao` or use adamw"
            ) from None
        kind = AdamW8bit
    return kind(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
