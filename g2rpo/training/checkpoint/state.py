"""What a checkpoint holds: trained weights, their EMA and the optimiser's states, by name."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from g2rpo.policy.checkpoint import copy_whole
from g2rpo.training.config import TrainConfig
from g2rpo.training.old_policy import OldPolicy
from g2rpo.training.weights import TrainedWeights


@dataclass(frozen=True)
class TrainingState:
    """Everything needed to resume a run; it changes in place."""

    config: TrainConfig
    run: Path
    weights: TrainedWeights
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None
    old: OldPolicy | None = None

    @property
    def accelerator(self) -> Accelerator:
        """Device and ranks."""
        return self.weights.accelerator

    @property
    def averages(self) -> dict[str, Tensor]:
        """The EMA of each parameter, by name."""
        return {} if self.ema is None else self._by_name(self.ema.shadow_params)

    @property
    def old_weights(self) -> dict[str, Tensor]:
        """The old policy's parameters, by name."""
        return {} if self.old is None else self._by_name(self.old.parameters)

    def _by_name(self, copies: Sequence[Tensor]) -> dict[str, Tensor]:
        names = [name for name, _ in self.weights.named]
        return dict(zip(names, copies, strict=True))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block, the trained weights are their EMA."""
        assert self.ema is not None
        self.ema.store(self.weights.parameters)
        self.ema.copy_to(self.weights.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.weights.parameters)

    def optimizer_states(self) -> dict[str, Tensor]:
        """The optimiser's states as ordinary tensors, ``<state>.<parameter>``."""
        return {
            f"{key}.{name}": _unpacked(value)
            for name, parameter in self.weights.named
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a sharded checkpoint, which share memory with the trained ones."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.weights.named}
        tensors |= {f"optimizer.{name}": state for name, state in self.optimizer_states().items()}
        tensors |= {f"old.{name}": value for name, value in self.old_weights.items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": average for name, average in self.averages.items()}
            tensors["ema.optimization_step"] = torch.tensor(self.ema.optimization_step)
        return tensors

    @torch.no_grad()
    def fill_optimizer(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Creates the states of all parameters and fills them from ``<state>.<name>``, if given.

        A parameter without a state in ``tensors`` gets none.
        """
        _make_states(self.optimizer)
        if tensors is None:
            return
        for name, parameter in self.weights.named:
            states = self.optimizer.state[parameter]
            if not all(f"{key}.{name}" in tensors for key in states):
                del self.optimizer.state[parameter]
                continue
            for key, value in states.items():
                copy_whole(value, tensors[f"{key}.{name}"].to(value.device))

    @torch.no_grad()
    def repack_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies ``optimizer.<state>.<name>`` into 8-bit states, which are sharded alike."""
        for name, parameter in self.weights.named:
            for key, value in self.optimizer.state[parameter].items():
                target, given = value, tensors[f"optimizer.{key}.{name}"]
                if isinstance(target, DTensor) and isinstance(given, DTensor):
                    target, given = target.to_local(), given.to_local()
                if _is_packed(target):
                    target.copy_(given)


def _unpacked(value: Tensor) -> Tensor:
    """A state as an ordinary tensor; for an 8-bit state, a float32 copy.

    Quantising it again mostly gives the same 8 bits, except in blocks whose largest entry is
    negative: the 8-bit numbers reach 1 but not -1.
    """
    if not isinstance(value, DTensor):
        return value.dequantize() if _is_packed(value) else torch.as_tensor(value)
    local = value.to_local()
    if not _is_packed(local):
        return value
    return DTensor.from_local(
        local.dequantize(),
        value.device_mesh,
        value.placements,
        shape=value.shape,
        stride=value.stride(),
    )


def _is_packed(value: Any) -> bool:
    return is_traceable_wrapper_subclass(value)


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter the states of an optimiser that has not taken a step."""
    groups = optimizer.param_groups
    rates = [float(group["lr"]) for group in groups]
    for group in groups:
        _set_rate(group, 0.0)
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(groups, rates, strict=True):
        _set_rate(group, rate)


def _set_rate(group: dict[str, object], rate: float) -> None:
    held = group["lr"]
    if isinstance(held, Tensor):
        held.fill_(rate)
    else:
        group["lr"] = rate
