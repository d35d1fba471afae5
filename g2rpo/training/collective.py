"""Decisions that all ranks take together."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from g2rpo.errors import UserError


def raise_together(accelerator: Accelerator, message: str | None) -> None:
    """Raises on every rank if any rank has a ``message``, so that none waits for another.

    Raises:
        UserError: the first rank's message.
    """
    messages = [message] if accelerator.num_processes == 1 else gather_object([message])
    for found in messages:
        if found is not None:
            raise UserError(found)


def sum_over_ranks(accelerator: Accelerator, values: Mapping[str, float]) -> dict[str, float]:
    """Each value summed over all ranks, in float64."""
    names = sorted(values)
    local = torch.tensor([values[name] for name in names], dtype=torch.float64)
    if accelerator.num_processes == 1:
        return dict(values)
    total = accelerator.reduce(local.to(accelerator.device), reduction="sum")
    return dict(zip(names, total.tolist(), strict=True))
