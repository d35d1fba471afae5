"""Small tensors on their way to the device, without making the host wait for it."""

from collections.abc import Sequence

import torch


def to_device(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A CPU tensor on ``device``; on a GPU it goes through page-locked memory.

    A copy from ordinary memory would wait until everything that was asked of the GPU before is
    done.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype or tensor.dtype, non_blocking=True)


def indices(places: Sequence[int], device: torch.device) -> torch.Tensor:
    """``places`` as an int64 tensor on ``device``; as an index, a list would be awaited."""
    return to_device(torch.tensor(places, dtype=torch.int64), device)
