"""Decoding in slices, each copied to the host while the next one is computed."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from g2rpo.batching import BatchSize

DECODE_PIXELS = 2**21
"""Pixels decoded at once: four images of 720x720. The decoder's memory grows with it."""
DECODE_IMAGES = 64
"""Images decoded at once, however small they are."""


def decode_size(resolution: int) -> BatchSize:
    """How many images of ``resolution`` pixels a side are decoded at once."""
    images = max(1, min(DECODE_IMAGES, DECODE_PIXELS // resolution**2))
    hint = "use policy.dtype=bfloat16, a smaller policy.resolution or a GPU with more memory"
    return BatchSize(images, "decoding", hint, unit="image")


def in_slices(
    decode: Callable[[Tensor], Tensor], latents: Tensor, size: BatchSize
) -> Iterator[Tensor]:
    """``decode`` of ``latents``, ``size`` rows at a time, on the CPU as soon as each is there.

    A slice is given when the next one has been asked of the device, so that the device does not
    wait for what is done with it. Where memory runs out, a slice is decoded again in smaller ones.
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
    """A tensor on its way to the CPU."""

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
        """The tensor on the CPU, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
