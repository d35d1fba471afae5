"""Copies small tensors to the device without making the host wait."""

from collections.abc import Sequence

import torch


def to_device(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A CPU tensor on ``device``, copied to a GPU through pinned memory.

    A copy from pageable memory would wait for all work queued on the GPU.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype or tensor.dtype, non_blocking=True)


def indices(places: Sequence[int], device: torch.device) -> torch.Tensor:
    """``places`` as an int64 tensor on ``device``; indexing with a list blocks the host."""
    return to_device(torch.tensor(places, dtype=torch.int64), device)
