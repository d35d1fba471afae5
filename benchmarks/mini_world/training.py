"""The optimizer that every model of the mini world is trained with."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class OneCycle:
    """AdamW with a one-cycle learning rate and gradients clipped to norm 1.

    Args:
        parameters: what is trained.
        learning_rate: peak learning rate.
        steps: length of the schedule.
        warmup: share of the steps before the peak.
        final_div_factor: initial learning rate over the final one.
        adamw: further arguments of :class:`torch.optim.AdamW`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        steps: int,
        warmup: float,
        final_div_factor: float = 1e4,
        **adamw: Any,
    ) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, learning_rate, **adamw)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            learning_rate,
            steps,
            pct_start=warmup,
            final_div_factor=final_div_factor,
        )

    def step(self, loss: Tensor) -> None:
        """Minimises ``loss`` by one step."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
