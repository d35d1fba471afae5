"""Approximate velocities for continuations.

After its last stochastic step a trajectory has no log-prob. Its velocities affect rewards but no
ratio, so they may be computed with other weights or less often. Everything else (the anchor, the
source states of recorded transitions, training, validation, sampling) stays exact.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import RolloutTree
from g2rpo.flow.sweep import Key
from g2rpo.policy.base import Policy
from g2rpo.policy.conditioning import Conditioning
from g2rpo.policy.config import ContinuationConfig
from g2rpo.policy.fp8 import Fp8Linear, fits
from g2rpo.policy.kernels import compile_blocks, is_compiled
from g2rpo.training.step_cache import CachedBlocks, StepCache

Refresh = tuple[Callable[[], Tensor], Callable[[Tensor], object]]
"""Returns a layer's current weight, and sets the twin's."""


class ContinuationPolicy:
    """A policy's approximate twin, which shares all weights that are not approximated."""

    def __init__(self, policy: Policy, config: ContinuationConfig) -> None:
        """Prepares the twin of ``policy``.

        Raises:
            UserError: ``merged_lora`` without adapters, sharded weights, or a step cache for an
                architecture that has none.
        """
        if config.step_cache is not None and not policy.has_step_cache:
            raise UserError(
                "approximate_rollout.step_cache is not supported for a "
                f"{policy.pipeline_class.__name__}; remove it"
            )
        exact, twin = policy.transformer, _same_weights(policy.transformer)
        if any(isinstance(p.data, torch.distributed.tensor.DTensor) for p in exact.parameters()):
            raise UserError(
                "approximate_rollout is not supported with sharded weights; use "
                "execution.sharding=replicated"
            )
        lists = policy.block_lists
        self.config, self._refreshes = config, _approximate(exact, twin, config, lists)
        if config.merged_lora and not self._refreshes:
            raise UserError("approximate_rollout.merged_lora needs lora")
        if any(is_compiled(module) for module in exact.modules()):
            compile_blocks(twin)
        self._blocks: CachedBlocks | None = None
        if config.step_cache is not None:
            blocks = [block for name in lists for block in twin.get_submodule(name).children()]
            self._blocks = CachedBlocks(blocks, config.step_cache.kind)
            for name in lists:
                twin.set_submodule(name, nn.ModuleList())
            twin.set_submodule(lists[0], nn.ModuleList([self._blocks]))
        self.policy = copy.copy(policy)
        self.policy.transformer = twin

    @contextlib.contextmanager
    def rollout(
        self, tree: RolloutTree, conditioning: Conditioning
    ) -> Iterator["RolloutContinuations"]:
        """The velocities of one walk over ``tree`` with the policy's current weights."""
        with torch.no_grad():
            for weight, refresh in self._refreshes:
                refresh(weight())
        if self._blocks is None or self.config.step_cache is None:
            yield RolloutContinuations(self.policy, conditioning)
            return
        self._blocks.cache = StepCache(self.config.step_cache, tree)
        try:
            yield RolloutContinuations(self.policy, conditioning, self._blocks.cache)
        finally:
            del self._blocks.cache


@dataclass(frozen=True)
class RolloutContinuations:
    """See :class:`g2rpo.flow.sweep.Continuations`."""

    policy: Policy
    conditioning: Conditioning
    cache: StepCache | None = None

    def __call__(
        self, latents: Tensor, times: Tensor, prompts: Tensor, keys: Sequence[Key]
    ) -> Tensor:
        if self.cache is not None:
            self.cache.keys = keys
        return self.policy.velocity(latents, times, self.conditioning.select(prompts))

    def passed(self, node: float) -> None:
        if self.cache is not None:
            self.cache.passed(node)

    @property
    def reused(self) -> int:
        """Velocities for which blocks have been skipped so far."""
        return 0 if self.cache is None else len(self.cache.reused)


def _same_weights(module: nn.Module) -> nn.Module:
    """A copy of ``module`` that shares its parameters and buffers and is not compiled."""
    shared: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _approximate(
    exact: nn.Module, twin: nn.Module, config: ContinuationConfig, block_lists: tuple[str, ...]
) -> list[Refresh]:
    """Replaces the layers of ``twin`` that ``config`` approximates; returns their refreshes."""
    refreshes: list[Refresh] = []
    for name, layer in exact.named_modules():
        merged = isinstance(layer, LoraLinear) and config.merged_lora
        if merged:
            linear, weight = layer.get_base_layer(), functools.partial(_merged_weight, layer)
        elif isinstance(layer, nn.Linear) and not (config.merged_lora and ".base_layer" in name):
            linear, weight = layer, functools.partial(getattr, layer, "weight")
        else:
            continue
        if config.fp8 and _is_projection(name, block_lists) and fits(linear):
            narrow = Fp8Linear(weight().detach(), linear.bias)
            twin.set_submodule(name, narrow)
            refreshes.append((weight, narrow.refresh))
        elif merged:
            wide = twin.get_submodule(f"{name}.base_layer")
            wide.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
            twin.set_submodule(name, wide)
            refreshes.append((weight, wide.weight.copy_))
    return refreshes


def _merged_weight(layer: LoraLinear) -> Tensor:
    """The weight with its adapters merged, in their dtype, at least float32."""
    delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
    merged: Tensor = layer.get_base_layer().weight + delta
    return merged


def _is_projection(name: str, block_lists: tuple[str, ...]) -> bool:
    """Whether a linear layer of this name multiplies tokens within a block."""
    return name.startswith(block_lists) and "norm" not in name and ".lora_" not in name
