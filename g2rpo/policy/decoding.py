"""Decodes in slices, each copied to the host while the next one is computed."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from g2rpo.batching import BatchSize

DECODE_PIXELS = 2**21
"""Pixels per slice: four images of 720x720. The decoder's memory is proportional."""
DECODE_IMAGES = 64
"""Maximum images per slice."""


def decode_size(pixels: int) -> BatchSize:
    """The number of images of so many pixels per slice."""
    images = max(1, min(DECODE_IMAGES, DECODE_PIXELS // pixels))
    hint = "use policy.dtype=bfloat16, smaller images (policy.resolution) or a GPU with more memory"
    return BatchSize(images, "decoding", hint, unit="image")


def in_slices(
    decode: Callable[[Tensor], Tensor], latents: Tensor, size: BatchSize
) -> Iterator[Tensor]:
    """Applies ``decode`` to ``latents``, ``size`` rows at a time, and yields slices on the CPU.

    Yields a slice after the next one has been queued, so that the device never waits for the
    consumer. A slice that runs out of memory is decoded again in smaller ones.
    """
    done = 0
    before: _Download | None = None

    def following(images: int) -> Tensor:
        return decode(latents[done : done + images])

    while done < len(latents):
        decoded = size.run(following)
        done += len(decoded)
        download = _Download(decoded)
        if before is not None:
            yield before.result()
        before = download
    if before is not None:
        yield before.result()


class _Download:
    """An asynchronous copy of a tensor to the CPU."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.cpu()
            return
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensor.device))

    def result(self) -> Tensor:
        """Waits for the copy and returns it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
