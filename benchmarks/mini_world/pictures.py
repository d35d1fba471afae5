"""Pools of pictures with their captions, drawn once before training."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.mini_world import world
from g2rpo.seeds import generator


@dataclass(frozen=True)
class PicturePool:
    """Images uint8 ``[N, 32, 32, 3]`` with their captions and layouts."""

    images: Tensor
    captions: list[str]
    layouts: list[world.Layout]

    def __len__(self) -> int:
        return len(self.captions)


def draw_pool(seed: int, stream: str, split: str, number: int) -> PicturePool:
    """``number`` fresh scenes of ``split`` with captions and pictures, from a named draw."""
    rng = generator(seed, f"pool-{stream}")
    scenes = [world.sample_scene(rng, split) for _ in range(number)]
    layouts = [world.lay_out(scene, rng) for scene in scenes]
    images = np.stack([world.draw(layout, rng) for layout in layouts])
    captions = [world.caption(scene, rng) for scene in scenes]
    return PicturePool(torch.from_numpy(images), captions, layouts)


def to_signed(images: Tensor) -> Tensor:
    """uint8 ``[N, H, W, 3]`` to float32 ``[N, 3, H, W]`` in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """float32 ``[N, 3, H, W]`` in [-1, 1] to uint8 ``[N, H, W, 3]``, rounded as in a saved PNG."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
