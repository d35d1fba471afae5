"""Models that wait in the CPU's memory while they are not used."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from g2rpo.config import StrictModel


class OffloadConfig(StrictModel):
    """What waits in the CPU's memory while it is not used; everything else stays on the device."""

    rewards: bool = False
    vae: bool = False
    text_encoders: bool = False


@contextmanager
def on_device(
    modules: Iterable[nn.Module], device: torch.device, *, offloaded: bool
) -> Iterator[None]:
    """Inside of the block ``modules`` are on ``device``; where ``offloaded``, only there."""
    if not offloaded:
        yield
        return
    held = list(modules)
    try:
        for module in held:
            module.to(device)
        yield
    finally:
        for module in held:
            module.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()
