"""The old policy: a copy of the trained weights that follows them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from g2rpo.training.forward import OldPolicyConfig
from g2rpo.training.weights import TrainedWeights


class OldPolicy:
    """A second set of the trained weights; everything else of the policy is shared.

    Attributes:
        parameters: its own, in the order of ``weights.parameters``.
    """

    def __init__(self, config: OldPolicyConfig, weights: TrainedWeights) -> None:
        self.config, self.weights = config, weights
        self.parameters = [parameter.detach().clone() for parameter in weights.parameters]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block, the transformer computes with the old weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for own, trained in zip(self.parameters, self.weights.parameters, strict=True):
            kept = trained.detach().clone()
            trained.copy_(own)
            own.copy_(kept)
        self.weights.updated()

    @torch.no_grad()
    def follow(self, steps: int) -> None:
        """Moves towards the trained weights, after ``steps`` optimizer steps in all."""
        share = 1.0 - self.config.decay(steps)
        for own, trained in zip(self.parameters, self.weights.parameters, strict=True):
            own.lerp_(trained.detach(), share)
