"""Rewards from the cosine of an image tower's and a text tower's features."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from g2rpo.rewards.base import BatchedReward, Images
from g2rpo.rewards.preprocessing import Preprocessing
from g2rpo.rewards.weights import PromptTokenizer


class ImageTower(BatchedReward):
    """A reward model of two towers; its image features also serve as a measure of similarity.

    Subclasses load the towers, the preprocessing and the tokenizer. The score is ``factor`` times
    the cosine, plus ``offset``.
    """

    preprocessing: Preprocessing
    tokenizer: PromptTokenizer
    factor: float = 1.0
    offset: float = 0.0

    @abstractmethod
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Unit-length features ``[B, D]`` of preprocessed pixels ``[B, 3, S, S]``."""

    @abstractmethod
    def encode_tokens(self, tokens: Any) -> Tensor:
        """Unit-length features ``[B, D]`` of what the tokenizer returns."""

    @torch.no_grad()
    def image_features(self, images: Images) -> Tensor:
        """Unit-length float32 features ``[N, D]`` of N > 0 images, on the CPU."""
        parts = []
        for start in range(0, len(images), self.batch_size):
            part = [image.cpu() for image in images[start : start + self.batch_size]]
            pixels = self.preprocessing(part).to(self.device)
            parts.append(self.encode_pixels(pixels).float().cpu())
        return torch.cat(parts)

    def prepare(self, images: Sequence[Tensor], prompts: Sequence[str]) -> tuple[Any, ...]:
        """Pixels, tokens of the distinct prompts, and the index ``[B]`` of each image's prompt.

        A group of images shares its prompt, so this saves most of the text tower's work.
        """
        position: dict[str, int] = {}
        index = [position.setdefault(prompt, len(position)) for prompt in prompts]
        return self.preprocessing(images), self.tokenizer(list(position)), torch.tensor(index)

    def evaluate(self, prepared: tuple[Any, ...]) -> Tensor:
        """Scores ``[B]``."""
        pixels, tokens, index = (part.to(self.device) for part in prepared)
        cosines = (self.encode_pixels(pixels) * self.encode_tokens(tokens)[index]).sum(-1)
        return self.factor * cosines + self.offset

    def too_long(self, prompts: Sequence[str]) -> list[bool]:
        return self.tokenizer.too_long(prompts)
