"""Reward models that wait in the CPU's memory between two scorings."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from g2rpo.offload import on_device
from g2rpo.rewards.base import Images, RewardModel


class OffloadedReward:
    """A reward model whose networks are on its device only while it scores.

    Everything else is the model's own.
    """

    def __init__(self, model: RewardModel, device: torch.device) -> None:
        self._model, self._device = model, device
        self._networks = list(dict.fromkeys(_networks(model, depth=2)))
        for network in self._networks:
            network.to("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """See :meth:`RewardModel.score`."""
        with on_device(self._networks, self._device, offloaded=True):
            return self._model.score(images, prompts)


def _networks(holder: object, depth: int) -> Iterator[nn.Module]:
    """The networks that ``holder`` keeps, directly or in an object that it keeps."""
    for value in vars(holder).values():
        if isinstance(value, nn.Module):
            yield value
        elif depth > 1 and type(value).__module__.startswith("g2rpo."):
            yield from _networks(value, depth - 1)
