"""Pictures and captions for the judges: groups of scenes that differ in one attribute each."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.mini_world import autoencoder, world
from g2rpo.seeds import generator

COLOURS, SHAPES = list(world.COLOURS), list(world.SHAPES)
SIZES, BACKGROUNDS = list(world.RADII), list(world.BACKGROUNDS)
CELL_CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1)
"""Classes of a cell's colour, shape and size; class 0 is an empty cell."""

LATENT_NOISE = 0.3
"""Largest standard deviation of the noise in a training picture's normalised latents."""


@dataclass(frozen=True)
class JudgePool:
    """``N`` groups of ``G`` scenes; within a group each differs from the first in one attribute.

    ``rendered`` and ``decoded`` (through the autoencoder) are uint8 ``[N, G, 32, 32, 3]``;
    ``cells`` is int64 ``[N, G, cells, 3]`` (colour, shape and size) and ``backgrounds`` ``[N, G]``:
    what each picture shows.
    """

    captions: list[list[str]]
    rendered: Tensor
    decoded: Tensor
    cells: Tensor
    backgrounds: Tensor

    def __len__(self) -> int:
        return len(self.captions)


def draw_judge_pool(
    seed: int, split: str, groups: int, members: int, vae: AutoencoderKL
) -> JudgePool:
    """Draws ``groups`` groups of ``members`` scenes of ``split``.

    Half of the groups share their random layout, shifts and tints, so that little but the altered
    attribute tells their pictures apart. Latents for training are disturbed a little before they
    are decoded, as those of a policy are not quite the autoencoder's own.
    """
    captions, images, cells, backgrounds = [], [], [], []
    for index in range(groups):
        rng = generator(seed, f"judge-{split}", index)
        shared = rng.random() < 0.5
        scenes = _group(rng, split, members)
        for member, scene in enumerate(scenes):
            key = 0 if shared else member
            picture_rng = generator(seed, f"judge-{split}-picture", index, key)
            layout = world.lay_out(scene, picture_rng)
            images.append(world.draw(layout, picture_rng))
            cells.append([_shown(shown) for shown in layout.cells])
            backgrounds.append(BACKGROUNDS.index(layout.background))
        captions.append([world.caption(scene, rng) for scene in scenes])
    rendered = torch.from_numpy(np.stack(images))
    decoded = _decode(vae, rendered, seed, LATENT_NOISE if split == "judge" else 0.0)
    shape = (groups, members)
    return JudgePool(
        captions,
        rendered.unflatten(0, shape),
        decoded.unflatten(0, shape),
        torch.tensor(cells).unflatten(0, shape),
        torch.tensor(backgrounds).unflatten(0, shape),
    )


def _group(rng: np.random.Generator, split: str, members: int) -> list[world.Scene]:
    """A scene and ``members - 1`` alterations, of as many different attributes as there are."""
    while True:
        first = world.sample_scene(rng, split)
        kinds: dict[str, list[world.Scene]] = {}
        for option in world.alterations(first):
            if split != "judge" or world.split_of(option) in ("train", "judge"):
                kinds.setdefault(world.altered_attribute(first, option), []).append(option)
        names = sorted(kinds)
        chosen = [names[i] for i in rng.permutation(len(names))[: members - 1]]
        if len(chosen) == members - 1:
            break
    return [first] + [kinds[name][int(rng.integers(len(kinds[name])))] for name in chosen]


def _decode(vae: AutoencoderKL, images: Tensor, seed: int, noise: float) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    latents = autoencoder.encode(vae, images, sample=False)
    spread = noise * torch.rand(len(latents), 1, 1, 1, generator=draws)
    latents += spread * torch.randn(latents.shape, generator=draws)
    return autoencoder.decode(vae, latents)


def _shown(shown: world.Shown | None) -> list[int]:
    if shown is None:
        return [0, 0, 0]
    places = (COLOURS, shown.colour), (SHAPES, shown.shape), (SIZES, shown.size)
    return [1 + options.index(value) for options, value in places]


def load_autoencoder(assets: Path) -> AutoencoderKL:
    """The trained autoencoder at ``assets``."""
    vae = AutoencoderKL.from_pretrained(assets / "policy" / "vae")
    vae.eval().requires_grad_(False)
    return vae


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training picture that leave its caption true; limits, in 0..1 pixels."""

    noise: float = 0.05
    """Largest standard deviation of Gaussian noise."""
    brightness: float = 0.04
    """Largest change of a channel."""
    blur: float = 0.3
    """Largest share of a 3 by 3 mean in the picture."""
    decoded: float = 0.6
    """Share of pictures that went through the autoencoder."""

    def __call__(self, rendered: Tensor, decoded: Tensor) -> Tensor:
        """Pixels ``[N, 3, 32, 32]`` in 0..1 of the same uint8 pictures rendered and decoded."""
        number = len(rendered)
        through = torch.rand(number, 1, 1, 1) < self.decoded
        pixels = to_pixels(torch.where(through, decoded, rendered))
        some = int(number * 0.4)  # blurring is slow, and most generated pictures are sharp
        share = torch.rand(some, 1, 1, 1) * self.blur
        pixels[:some].lerp_(_smooth(pixels[:some]), share)
        pixels += (torch.rand(number, 3, 1, 1) * 2 - 1) * self.brightness
        pixels += torch.randn_like(pixels) * (torch.rand(number, 1, 1, 1) * self.noise)
        return pixels.clamp_(0, 1)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 ``[N, H, W, 3]`` to float32 ``[N, 3, H, W]`` in 0..1."""
    return images.permute(0, 3, 1, 2).contiguous().float().div_(255)


def to_images(pixels: Tensor) -> Tensor:
    """Inverse of :func:`to_pixels`."""
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _smooth(pixels: Tensor) -> Tensor:
    """The mean over 3 by 3 pixels."""
    rows = torch.nn.functional.pad(pixels, (0, 0, 1, 1), mode="replicate")
    rows = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 3
    columns = torch.nn.functional.pad(rows, (1, 1, 0, 0), mode="replicate")
    return (columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:]) / 3


def degrade(pixels: Tensor) -> Tensor:
    """Pictures that a person would like less: each is mixed with another one and blurred."""
    mixed = pixels.lerp(pixels.roll(1, 0), 0.15 + 0.35 * torch.rand(len(pixels), 1, 1, 1))
    small = torch.nn.functional.avg_pool2d(mixed, 2)
    blurred = torch.nn.functional.interpolate(small, scale_factor=2.0, mode="bilinear")
    return mixed.lerp(blurred, torch.rand(len(pixels), 1, 1, 1))
