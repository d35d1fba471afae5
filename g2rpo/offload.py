"""Keeps models in CPU memory while they are not used."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from g2rpo.config import StrictModel


class OffloadConfig(StrictModel):
    """What is kept in CPU memory while it is not used; the rest stays on the device."""

    rewards: bool = False
    vae: bool = False
    text_encoders: bool = False


@contextmanager
def on_device(
    modules: Iterable[nn.Module], device: torch.device, *, offloaded: bool
) -> Iterator[None]:
    """Within the block ``modules`` are on ``device``; if ``offloaded``, only within it."""
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
