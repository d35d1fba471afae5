"""Training of the attribute reward model on rendered and on decoded pictures."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from pydantic import Field
from torch import Tensor, nn

from benchmarks.mini_world import autoencoder, world
from benchmarks.mini_world.pictures import PicturePool, draw_pool
from benchmarks.mini_world.training import OneCycle
from g2rpo.config import StrictModel
from g2rpo.progress import ProgressReport
from g2rpo.rewards.attributes import AttributeReader, ReaderConfig, share

NOTHING = -100
"""Ignored target: colour and size of an empty cell."""


class AttributeSettings(StrictModel):
    """Training of the attribute reward model."""

    pictures: int = Field(default=10000, ge=1)
    steps: int = Field(default=700, ge=1)
    batch_size: int = Field(default=48, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    widths: tuple[int, ...] = (16, 32, 48)
    noise: float = Field(default=0.08, ge=0)
    """Largest standard deviation of the noise added to pixels in [-1, 1]."""
    held_out: int = Field(default=1000, ge=1)


def reader_config(settings: AttributeSettings) -> ReaderConfig:
    """The reader of the mini world's attributes."""
    return ReaderConfig(
        version="mini-world-1",
        resolution=world.RESOLUTION,
        layout=(2, 2),
        shapes=list(world.SHAPES),
        colours=list(world.COLOURS),
        sizes=list(world.RADII),
        backgrounds=list(world.BACKGROUNDS),
        widths=list(settings.widths),
        grammar=world.GRAMMAR,
    )


def targets(layouts: list[world.Layout], config: ReaderConfig) -> dict[str, Tensor]:
    """Class indices: shapes, colours and sizes ``[N, cells]``, backgrounds ``[N]``."""
    shapes = {name: i + 1 for i, name in enumerate(config.shapes)}
    colours = {name: i for i, name in enumerate(config.colours)}
    sizes = {name: i for i, name in enumerate(config.sizes)}
    cells = [layout.cells for layout in layouts]
    return {
        "shape": torch.tensor([[shapes[c.shape] if c else 0 for c in row] for row in cells]),
        "colour": torch.tensor(
            [[colours[c.colour] if c else NOTHING for c in row] for row in cells]
        ),
        "size": torch.tensor([[sizes[c.size] if c else NOTHING for c in row] for row in cells]),
        "background": torch.tensor(
            [config.backgrounds.index(layout.background) for layout in layouts]
        ),
    }


def disturb(pixels: Tensor, noise: float) -> Tensor:
    """Pixels ``[B, 3, H, W]`` with blur and noise of random strength."""
    count = len(pixels)
    blurred = nn.functional.avg_pool2d(
        nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1
    )
    amount = 0.5 * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.5)
    spread = noise * torch.rand(count, 1, 1, 1)
    return torch.lerp(pixels, blurred, amount) + spread * torch.randn_like(pixels)


def train(
    settings: AttributeSettings, seed: int, vae: AutoencoderKL, folder: Path
) -> dict[str, Any]:
    """Trains the attribute reader, saves it to ``folder`` and returns its held-out accuracy."""
    torch.manual_seed(seed)
    config = reader_config(settings)
    reader = AttributeReader(config)
    pool = draw_pool(seed, "attributes", "judge", settings.pictures)
    half = settings.pictures // 2
    latents = autoencoder.noised(autoencoder.encode(vae, pool.images[half:]), 0.3, seed)
    images = torch.cat([pool.images[:half], autoencoder.decode(vae, latents)])
    classes = targets(pool.layouts, config)
    optimizer = OneCycle(
        reader.parameters(), settings.learning_rate, settings.steps, 0.1, weight_decay=1e-3
    )
    with ProgressReport("attribute reader", settings.steps) as progress:
        for step in range(1, settings.steps + 1):
            index = torch.randint(len(images), (settings.batch_size,))
            scores = reader(disturb(reader.prepare(images[index]), settings.noise))
            loss = torch.stack(
                [
                    nn.functional.cross_entropy(
                        score.flatten(0, -2), classes[name][index].flatten(), ignore_index=NOTHING
                    )
                    for name, score in zip(classes, scores, strict=True)
                ]
            ).sum()
            optimizer.step(loss)
            progress.update(step, f"loss {loss.item():.4f}")
    reader.eval().save(folder)
    held_out = draw_pool(seed, "attributes-held-out", "test", settings.held_out)
    return {
        "parameters": sum(p.numel() for p in reader.parameters()),
        "rendered": accuracy(reader, held_out, held_out.images),
        "decoded": accuracy(reader, held_out, autoencoder.reconstruct(vae, held_out.images)),
    }


def accuracy(reader: AttributeReader, pool: PicturePool, images: Tensor) -> dict[str, float]:
    """Accuracy of the readings of ``images``, which show the pool's scenes.

    Returns:
        The accuracy of each attribute and of whole images, and the mean share of a caption's
        attributes found (``score``).
    """
    truth = targets(pool.layouts, reader.config)
    with torch.no_grad():
        parts = [reader(reader.prepare(part)) for part in images.split(256)]
    report: dict[str, float] = {}
    whole = torch.ones(len(images), dtype=torch.bool)
    for i, (name, classes) in enumerate(truth.items()):
        right = torch.cat([part[i] for part in parts]).argmax(-1) == classes
        readable = classes != NOTHING
        report[name] = round(right[readable].float().mean().item(), 4)
        whole &= (right | ~readable).reshape(len(images), -1).all(1)
    report["whole_image"] = round(whole.float().mean().item(), 4)
    shares = caption_shares(reader, images, pool.captions)
    report["score"] = round(sum(shares) / len(shares), 4)
    return report


def caption_shares(reader: AttributeReader, images: Tensor, captions: list[str]) -> list[float]:
    """The share of each caption's attributes that its image shows."""
    readings = [reading for part in images.split(256) for reading in reader.read(part)]
    return [
        share(reader.config.grammar, world.scene_of(text), reading)
        for text, reading in zip(captions, readings, strict=True)
    ]
