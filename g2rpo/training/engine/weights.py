"""The trained weights, whole on every rank."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from g2rpo.policy import FluxPolicy


class TrainedWeights:
    """The transformer's trainable parameters as they are: computed with and stepped in one dtype.

    No gradient crosses ranks before :meth:`reduce_gradients`, so that a rank that runs out of
    memory keeps no other waiting.

    Attributes:
        policy: the policy whose transformer is trained.
        accelerator: device and ranks.
        named: what the optimiser steps, by the transformer's own names.
    """

    sharded = False
    """Whether ranks wait for each other within a forward."""
    waits = False
    """Whether they do so in the rollout that is under way."""

    def __init__(self, policy: FluxPolicy, accelerator: Accelerator) -> None:
        self.policy, self.accelerator = policy, accelerator
        self.computed = [
            (n, p) for n, p in policy.transformer.named_parameters() if p.requires_grad
        ]
        self.named = self.computed

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser steps."""
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
        """Clips the gradient's norm; returns what it was."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, max_norm))

    def drop_gradients(self) -> None:
        """Forgets all gradients, those of an interrupted backward among them."""
        for _, parameter in (*self.named, *self.computed):
            parameter.grad = None

    def updated(self) -> None:
        """To be called when ``named`` has changed: the transformer then computes with it."""

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside of the block the transformer's parameters are the optimiser's own.

        For saving and loading; nothing is computed there.
        """
        yield

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Inside of the block, forwards without gradients may come in any number."""
        yield

    def reference(self) -> FluxPolicy:
        """The policy with the current transformer, frozen, whatever is trained later."""
        reference = copy.copy(self.policy)
        reference.transformer = copy.deepcopy(self.policy.transformer)
        reference.transformer.requires_grad_(False)
        return reference


class MasterWeights(TrainedWeights):
    """Trained parameters that are stepped in float32 and computed with in a narrower dtype.

    At a learning rate of 1e-6 most steps are below the rounding of bfloat16 and would be lost.
    Gradients are summed over micro-batches in float32 as well.
    """

    def __init__(self, policy: FluxPolicy, accelerator: Accelerator) -> None:
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
        """See :meth:`TrainedWeights.exact`."""
        rounded = [computed.data for _, computed in self.computed]
        for (_, computed), (_, master) in zip(self.computed, self.named, strict=True):
            computed.data = master.data
        try:
            yield
        finally:
            for (_, computed), data in zip(self.computed, rounded, strict=True):
                computed.data = data


def _add_to(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """Moves a parameter's gradient to its master as soon as it is there."""

    def move(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad.add_(gradient)
        parameter.grad = None

    return move
