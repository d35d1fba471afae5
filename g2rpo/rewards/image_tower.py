"""Rewards with an image tower, whose features also tell how alike images are."""

from abc import abstractmethod

import torch
from torch import Tensor

from g2rpo.rewards.base import BatchedReward, Images
from g2rpo.rewards.preprocessing import Preprocessing


class ImageTower(BatchedReward):
    """A reward model whose images go through a tower of their own, without the prompt."""

    preprocessing: Preprocessing

    @abstractmethod
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Features ``[B, D]`` of unit length, of preprocessed pixels ``[B, 3, S, S]``."""

    @torch.no_grad()
    def image_features(self, images: Images) -> Tensor:
        """Features of N images (N > 0), ``batch_size`` of them at a time.

        Returns:
            float32 ``[N, D]`` on the CPU, each of unit length.
        """
        parts = []
        for start in range(0, len(images), self.batch_size):
            part = [image.cpu() for image in images[start : start + self.batch_size]]
            pixels = self.preprocessing(part).to(self.device)
            parts.append(self.encode_pixels(pixels).float().cpu())
        return torch.cat(parts)
