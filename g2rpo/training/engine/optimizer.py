"""The optimiser and its states: whole or in 8 bits, on whole or sharded parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from g2rpo.errors import UserError
from g2rpo.policy.checkpoint import copy_whole
from g2rpo.training.config import OptimizationConfig

NamedParameters = Sequence[tuple[str, nn.Parameter]]


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
            from torchao.optim import AdamW8bit
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


def unpacked(value: Tensor) -> Tensor:
    """A state as an ordinary tensor; of an 8-bit one, a float32 copy.

    Packed again, most of it gives the same 8 bits; blocks whose largest entry is negative do not,
    since the 8-bit numbers reach 1 but not -1.
    """
    if isinstance(value, DTensor):
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
    return value.dequantize() if _is_packed(value) else torch.as_tensor(value)


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter the states of an optimiser that has not moved anything."""
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


@torch.no_grad()
def fill_states(
    optimizer: torch.optim.Optimizer,
    named: NamedParameters,
    tensors: Mapping[str, Tensor] | None,
) -> None:
    """Makes the states of all parameters, and fills them from ``<state>.<name>`` where given.

    A parameter without a state in ``tensors`` keeps none.
    """
    _make_states(optimizer)
    if tensors is None:
        return
    for name, parameter in named:
        states = optimizer.state[parameter]
        if not all(f"{key}.{name}" in tensors for key in states):
            del optimizer.state[parameter]
            continue
        for key, value in states.items():
            _copy_state(value, tensors[f"{key}.{name}"])


@torch.no_grad()
def write_back(
    optimizer: torch.optim.Optimizer, named: NamedParameters, tensors: Mapping[str, Tensor]
) -> None:
    """Copies ``optimizer.<state>.<name>``, sharded as they are, into states that are packed."""
    for name, parameter in named:
        for key, value in optimizer.state[parameter].items():
            given = tensors[f"optimizer.{key}.{name}"]
            if isinstance(value, DTensor) and isinstance(given, DTensor):
                target, given = value.to_local(), given.to_local()
            else:
                target = value
            if _is_packed(target):
                target.copy_(given)


def _is_packed(value: Any) -> bool:
    return is_traceable_wrapper_subclass(value)


def _copy_state(target: Tensor, whole: Tensor) -> None:
    copy_whole(target, whole.to(target.device))
