"""Pictures and captions for the reward models, in groups that differ in one attribute."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from benchmarks.mini_world import autoencoder, world
from g2rpo.seeds import generator

COLOURS, SHAPES = list(world.COLOURS), list(world.SHAPES)
SIZES, BACKGROUNDS = list(world.RADII), list(world.BACKGROUNDS)
CELL_CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1)
"""Classes of a cell's colour, shape and size; class 0 is an empty cell."""

_NAMES = (COLOURS, SHAPES)
_GROUP_CLASSES: tuple[Sequence[object], ...] = (
    COLOURS,
    SHAPES,
    [None, *SIZES],
    [None, *world.PLACES],
    list(world.COUNT_WORDS),
)
_RELATIONS: Sequence[object] = [None, *world.RELATIONS]
MOST_GROUPS = 3
CAPTION_CLASSES = (
    *(len(options) for options in _GROUP_CLASSES * MOST_GROUPS),
    *(len(options) for options in _NAMES * 2),
    len(_RELATIONS),
)
"""Classes of what :func:`wording_of` says of a caption."""
UNSAID = -100
"""Ignored class."""

KIND_WEIGHTS = {"relation": 4.0, "place": 4.0, "size": 2.0}
"""Oversampling of alterations that are hard to learn, relative to colours, shapes and counts."""


@dataclass(frozen=True)
class GroupPool:
    """``N`` groups of ``G`` scenes; within a group each differs from the first in one attribute.

    ``images`` is uint8 ``[N, G, 32, 32, 3]``; ``cells`` is int64 ``[N, G, cells, 3]`` (colour,
    shape and size) and ``backgrounds`` ``[N, G]``: what each picture shows.
    """

    captions: list[list[str]]
    images: Tensor
    cells: Tensor
    backgrounds: Tensor

    def __len__(self) -> int:
        return len(self.captions)


def draw_group_pool(seed: int, split: str, groups: int, members: int) -> GroupPool:
    """Draws ``groups`` groups of ``members`` scenes of ``split``.

    Half of the groups share their random layout, shifts and tints, so their pictures differ in
    little but the altered attribute.
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
    shape = (groups, members)
    return GroupPool(
        captions,
        torch.from_numpy(np.stack(images)).unflatten(0, shape),
        torch.tensor(cells).unflatten(0, shape),
        torch.tensor(backgrounds).unflatten(0, shape),
    )


def _group(rng: np.random.Generator, split: str, members: int) -> list[world.Scene]:
    """A scene and ``members - 1`` alterations, of as many different attributes."""
    allowed = ("train", "judge") if split == "judge" else world.SPLITS
    while True:
        first = world.sample_scene(rng, split)
        kinds: dict[str, list[world.Scene]] = {}
        for option in world.alterations(first):
            kinds.setdefault(world.altered_attribute(first, option), []).append(option)
        if len(kinds) < members - 1:
            continue
        names = sorted(kinds)
        weights = np.array([KIND_WEIGHTS.get(name, 1.0) for name in names])
        if split != "judge":
            weights = np.ones(len(names))
        chosen = rng.choice(len(names), members - 1, replace=False, p=weights / weights.sum())
        options = [kinds[names[i]] for i in chosen]
        altered = [option[int(rng.integers(len(option)))] for option in options]
        if all(world.split_of(scene) in allowed for scene in altered):
            return [first, *altered]


def decode_share(
    pool: GroupPool, vae: AutoencoderKL, share: float, noise: float, seed: int
) -> GroupPool:
    """``pool`` with the pictures of a ``share`` of its groups encoded and decoded.

    The noise on their latents stands for a policy's errors.
    """
    number = round(share * len(pool))
    latents = autoencoder.encode(vae, pool.images[:number].flatten(0, 1), sample=False)
    latents = autoencoder.noised(latents, noise, seed)
    decoded = autoencoder.decode(vae, latents).unflatten(0, pool.images[:number].shape[:2])
    images = torch.cat([decoded, pool.images[number:]])
    return GroupPool(pool.captions, images, pool.cells, pool.backgrounds)


def facts_of(pool: GroupPool) -> Tensor:
    """Facts about each picture, bool ``[N, G, facts]``.

    Pairs of attributes of one shape (is there a red star? a small star? a star on the left?),
    pairs of shapes (is something red left of something blue? a star above a ring?), colours that
    occur more than once, and the background.
    """
    colours, shapes, sizes = (
        functional.one_hot(pool.cells[..., part], classes)[..., 1:].float()
        for part, classes in enumerate(CELL_CLASSES)
    )
    cells = world.GRAMMAR.place_cells
    places = torch.zeros(world.GRAMMAR.cells, len(world.SIDES))
    for column, side in enumerate(world.SIDES):
        places[cells[side], column] = 1
    # ``apart[r, c, d]``: cell c is left of cell d (r = 0), or above it (r = 1).
    apart = torch.zeros(2, world.GRAMMAR.cells, world.GRAMMAR.cells)
    for row, relation in enumerate(("left of", "above")):
        for first, second in world.GRAMMAR.relation_cells[relation]:
            apart[row, first, second] = 1
    joined = [
        torch.einsum("ngci,ngcj->ngij", colours, shapes),
        torch.einsum("ngci,ngcj->ngij", colours, sizes),
        torch.einsum("ngci,ngcj->ngij", shapes, sizes),
        torch.einsum("ngci,cj->ngij", colours, places),
        torch.einsum("ngci,cj->ngij", shapes, places),
        torch.einsum("ngci,rcd,ngdj->ngrij", colours, apart, colours),
        torch.einsum("ngci,rcd,ngdj->ngrij", shapes, apart, shapes),
    ]
    several = torch.stack([colours.sum(2) > 1, colours.sum(2) > 2], -1)
    background = functional.one_hot(pool.backgrounds, len(BACKGROUNDS)).bool()
    parts = [(join > 0).flatten(2) for join in joined]
    return torch.cat([*parts, several.flatten(2), background], -1)


def wording_of(pool: GroupPool) -> Tensor:
    """What each caption says, as classes, int64 ``[N, G, len(CAPTION_CLASSES)]``.

    Colour, shape, size, place and number of its first, second and third kind of shape; colour and
    shape of the two that a relation places, now from left to right or from top to bottom; the
    relation. A text tower that learns only from pictures takes thousands of steps to see that
    "left of" depends on the order of the words.
    """
    return torch.tensor([[_wording(text) for text in captions] for captions in pool.captions])


def _wording(text: str) -> list[int]:
    scene = world.scene_of(text)
    classes: list[int] = []
    for group in scene.groups:
        said = (group.colour, group.shape, group.size, group.place, group.count)
        classes += [o.index(value) for o, value in zip(_GROUP_CLASSES, said, strict=True)]
    classes += [UNSAID] * (len(_GROUP_CLASSES) * MOST_GROUPS - len(classes))
    if scene.relation is None:
        classes += [UNSAID] * (2 * len(_NAMES))
    else:
        pair = scene.groups[:2] if scene.relation in ("left of", "above") else scene.groups[1::-1]
        classes += [i for g in pair for i in (COLOURS.index(g.colour), SHAPES.index(g.shape))]
    return [*classes, _RELATIONS.index(scene.relation)]


def _shown(shown: world.Shown | None) -> list[int]:
    if shown is None:
        return [0, 0, 0]
    places = (COLOURS, shown.colour), (SHAPES, shown.shape), (SIZES, shown.size)
    return [1 + options.index(value) for options, value in places]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training picture that leave its caption true, for pixels in 0..1."""

    noise: float = 0.05
    """Largest standard deviation of Gaussian noise."""
    brightness: float = 0.04
    """Largest change of a channel."""
    blur: float = 0.3
    """Largest weight of the 3×3 mean."""

    def __call__(self, images: Tensor) -> Tensor:
        """Pixels ``[N, 3, 32, 32]`` in 0..1 of uint8 images ``[N, 32, 32, 3]``."""
        number = len(images)
        pixels = to_pixels(images)
        some = torch.randperm(number)[: int(number * 0.4)]  # blurring all would be slow
        share = torch.rand(len(some), 1, 1, 1) * self.blur
        pixels[some] = pixels[some].lerp(_smooth(pixels[some]), share)
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
    """The mean over 3×3 pixels."""
    rows = functional.pad(pixels, (0, 0, 1, 1), mode="replicate")
    rows = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 3
    columns = functional.pad(rows, (1, 1, 0, 0), mode="replicate")
    return (columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:]) / 3


def degrade(pixels: Tensor) -> Tensor:
    """Worse pictures: each is mixed with another one and blurred."""
    mixed = pixels.lerp(pixels.roll(1, 0), 0.15 + 0.35 * torch.rand(len(pixels), 1, 1, 1))
    small = functional.avg_pool2d(mixed, 2)
    blurred = functional.interpolate(small, scale_factor=2.0, mode="bilinear")
    return mixed.lerp(blurred, torch.rand(len(pixels), 1, 1, 1))
