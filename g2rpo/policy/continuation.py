"""Declared approximations of the velocity, for continuations alone.

A trajectory after its last stochastic step has no log-probability. Its velocities decide rewards,
but no ratio, so they may be computed on other weights or less often. Everything else (the anchor,
the states that recorded transitions leave, training, validation, sampling) stays exact.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import RolloutTree
from g2rpo.flow.sweep import Key
from g2rpo.policy.conditioning import Conditioning
from g2rpo.policy.config import ContinuationConfig
from g2rpo.policy.flux import FluxPolicy
from g2rpo.policy.fp8 import Fp8Linear, fits
from g2rpo.policy.kernels import compile_blocks, is_compiled
from g2rpo.policy.step_cache import CachedBlocks, StepCache

BLOCKS = ("transformer_blocks", "single_transformer_blocks")


class ContinuationPolicy:
    """A policy's approximate twin; shares with it all weights that are not approximated."""

    def __init__(self, policy: FluxPolicy, config: ContinuationConfig) -> None:
        """Prepares the twin of ``policy``.

        Raises:
            UserError: ``merged_lora`` without adapters, or weights that are sharded.
        """
        if any(_is_sharded(p) for p in policy.transformer.parameters()):
            raise UserError(
                "approximate_rollout: not with sharded weights; use execution.sharding: replicated"
            )
        self.config = config
        self._refreshes: list[Callable[[], None]] = []
        transformer = self._approximated(policy.transformer)
        if config.merged_lora and not self._refreshes:
            raise UserError("approximate_rollout.merged_lora: there are no adapters; it needs lora")
        self._blocks: CachedBlocks | None = None
        if config.step_cache is not None:
            transformer, self._blocks = _with_cached_blocks(transformer, config.step_cache.kind)
        self.policy = copy.copy(policy)
        self.policy.transformer = transformer

    def _approximated(self, transformer: nn.Module) -> nn.Module:
        def replace(name: str, module: nn.Module) -> nn.Module | None:
            if isinstance(module, LoraLinear) and self.config.merged_lora:
                return self._merged(name, module)
            narrow = self.config.fp8 and isinstance(module, nn.Linear) and _is_projection(name)
            if narrow and fits(module):  # type: ignore[arg-type]
                return self._narrow(module.weight, lambda: module.weight, module.bias)  # type: ignore[arg-type,return-value]
            return None

        twin = _replaced(transformer, replace)
        if twin is not transformer and any(is_compiled(m) for m in transformer.modules()):
            compile_blocks(twin)  # those that were copied are not compiled
        return twin

    def _merged(self, name: str, layer: LoraLinear) -> nn.Module:
        base: nn.Linear = layer.get_base_layer()

        def weight() -> Tensor:
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            merged: Tensor = base.weight + delta  # in the adapters' dtype, at least float32
            return merged

        if self.config.fp8 and _is_projection(name) and fits(base):
            return self._narrow(weight().detach(), weight, base.bias)
        linear: nn.Linear = _shallow(base)
        linear.register_parameter(
            "weight", nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        )

        def refresh() -> None:
            linear.weight.copy_(weight())

        self._refreshes.append(refresh)
        return linear

    def _narrow(
        self, now: Tensor, weight: Callable[[], Tensor], bias: nn.Parameter | None
    ) -> nn.Module:
        linear = Fp8Linear(now, bias)
        self._refreshes.append(lambda: linear.refresh(weight()))
        return linear

    @contextlib.contextmanager
    def rollout(
        self, tree: RolloutTree, conditioning: Conditioning
    ) -> Iterator["RolloutContinuations"]:
        """The velocities of one walk over ``tree``, on the policy's current weights."""
        with torch.no_grad():
            for refresh in self._refreshes:
                refresh()
        cache = None
        if self._blocks is not None:
            assert self.config.step_cache is not None
            cache = self._blocks.cache = StepCache(self.config.step_cache, tree)
        try:
            yield RolloutContinuations(self.policy, conditioning, cache)
        finally:
            if self._blocks is not None:
                del self._blocks.cache


class RolloutContinuations:
    """See :class:`g2rpo.flow.sweep.Continuations`."""

    def __init__(
        self, policy: FluxPolicy, conditioning: Conditioning, cache: StepCache | None
    ) -> None:
        self._policy, self._conditioning, self._cache = policy, conditioning, cache

    def __call__(
        self, latents: Tensor, times: Tensor, prompts: Tensor, keys: Sequence[Key]
    ) -> Tensor:
        """See :class:`g2rpo.flow.sweep.Continuations`."""
        if self._cache is not None:
            self._cache.keys = keys
        return self._policy.velocity(latents, times, self._conditioning.select(prompts))

    def passed(self, node: int) -> None:
        """See :class:`g2rpo.flow.sweep.Continuations`."""
        if self._cache is not None:
            self._cache.passed(node)

    @property
    def reused(self) -> int:
        """Velocities so far for which blocks were skipped."""
        return 0 if self._cache is None else self._cache.reused


def _is_projection(name: str) -> bool:
    """Whether a linear layer of that name multiplies tokens within a block."""
    return name.startswith(BLOCKS) and "norm" not in name and ".lora_" not in name


def _is_sharded(parameter: nn.Parameter) -> bool:
    return isinstance(parameter.data, torch.distributed.tensor.DTensor)


def _shallow(module: Any) -> Any:
    """The module with tables of its own for what it holds, and the same things in them."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for table in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[table] = dict(module.__dict__[table])
    twin.__dict__.pop("_compiled_call_impl", None)  # it calls the original
    return twin


def _replaced(
    module: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None], name: str = ""
) -> nn.Module:
    """``module`` with what ``replace`` gives for parts of it; copied only where a part changes."""
    found = replace(name, module)
    if found is not None:
        return found
    changed = {}
    for key, child in module.named_children():
        other = _replaced(child, replace, f"{name}.{key}" if name else key)
        if other is not child:
            changed[key] = other
    if not changed:
        return module
    twin: nn.Module = _shallow(module)
    for key, child in changed.items():
        twin.__dict__["_modules"][key] = child
    return twin


def _with_cached_blocks(transformer: nn.Module, kind: str) -> tuple[nn.Module, CachedBlocks]:
    """The transformer with all of its blocks in one that has a cache."""
    blocks = [block for name in BLOCKS for block in transformer.get_submodule(name).children()]
    cached = CachedBlocks(blocks, kind)
    twin = _shallow(transformer)
    twin.__dict__["_modules"]["transformer_blocks"] = nn.ModuleList([cached])
    twin.__dict__["_modules"]["single_transformer_blocks"] = nn.ModuleList([])
    return twin, cached
