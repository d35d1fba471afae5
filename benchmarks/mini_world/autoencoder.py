"""The autoencoder: 32×32 pixels to 8×8 latents of 16 channels and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from pydantic import Field
from torch import Tensor

from benchmarks.mini_world.pictures import PicturePool, draw_pool, to_bytes, to_signed
from benchmarks.mini_world.training import OneCycle
from g2rpo.config import StrictModel
from g2rpo.progress import ProgressReport


class AutoencoderSettings(StrictModel):
    """Training of the autoencoder."""

    pictures: int = Field(default=20000, ge=1)
    steps: int = Field(default=6000, ge=1)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    kl_weight: float = Field(default=1e-4, ge=0)
    """Weight of the KL divergence to the standard normal, averaged over latent values."""
    channels: tuple[int, int, int] = (8, 24, 48)


def build(settings: AutoencoderSettings) -> AutoencoderKL:
    """An untrained autoencoder like FLUX's, without quantisation convolutions."""
    levels = len(settings.channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=settings.channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def load(assets: Path) -> AutoencoderKL:
    """The trained autoencoder below ``assets``, frozen and in evaluation mode."""
    vae = AutoencoderKL.from_pretrained(assets / "policy" / "vae")
    return vae.eval().requires_grad_(False)


def train(settings: AutoencoderSettings, seed: int, folder: Path) -> dict[str, Any]:
    """Trains an autoencoder, saves it to ``folder`` and returns its held-out quality."""
    torch.manual_seed(seed)
    model = build(settings)
    pool = draw_pool(seed, "autoencoder", "train", settings.pictures)
    optimizer = OneCycle(
        model.parameters(), settings.learning_rate, settings.steps, 0.05,
        weight_decay=1e-4, fused=True,
    )  # fmt: skip
    with ProgressReport("autoencoder", settings.steps) as progress:
        for step in range(settings.steps):
            pixels = to_signed(pool.images[torch.randint(len(pool), (settings.batch_size,))])
            posterior = model.encode(pixels).latent_dist
            reconstruction = model.decode(posterior.sample()).sample
            error = (reconstruction - pixels).square().mean()
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            optimizer.step(error + settings.kl_weight * kl)
            progress.update(step + 1, f"squared error {error.item():.5f}, KL {kl.item():.2f}")
    model.eval()
    normalise(model, pool.images[:2048])
    model.save_pretrained(folder)
    held_out = draw_pool(seed, "autoencoder-held-out", "test", 512)
    return {"parameters": sum(p.numel() for p in model.parameters())} | quality(model, held_out)


@torch.no_grad()
def normalise(model: AutoencoderKL, images: Tensor) -> None:
    """Sets the config's shift and scale so that latents have mean 0 and variance 1."""
    latents = model.encode(to_signed(images)).latent_dist.sample()
    model.register_to_config(
        shift_factor=round(latents.mean().item(), 4),
        scaling_factor=round(1 / latents.std().item(), 4),
    )


@torch.no_grad()
def encode(model: AutoencoderKL, images: Tensor, sample: bool = True) -> Tensor:
    """Normalised latents ``[N, 16, 8, 8]`` of uint8 images ``[N, 32, 32, 3]``."""

    def one(part: Tensor) -> Tensor:
        posterior = model.encode(to_signed(part)).latent_dist
        latents = posterior.sample() if sample else posterior.mode()
        normalised: Tensor = (latents - model.config.shift_factor) * model.config.scaling_factor
        return normalised

    return _in_batches(one, images)


@torch.no_grad()
def decode(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """uint8 images ``[N, 32, 32, 3]`` of normalised latents ``[N, 16, 8, 8]``."""

    def one(part: Tensor) -> Tensor:
        raw = part / model.config.scaling_factor + model.config.shift_factor
        return to_bytes(model.decode(raw).sample)

    return _in_batches(one, latents)


def noised(latents: Tensor, largest: float, seed: int) -> Tensor:
    """Latents with noise, whose standard deviation is drawn between 0 and ``largest`` for each."""
    draws = torch.Generator().manual_seed(seed)
    spread = largest * torch.rand(len(latents), 1, 1, 1, generator=draws)
    return latents + spread * torch.randn(latents.shape, generator=draws)


def reconstruct(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Images through the autoencoder and back, as uint8."""
    return decode(model, encode(model, images))


def quality(model: AutoencoderKL, pool: PicturePool) -> dict[str, float]:
    """Reconstruction MSE (pixels in [-1, 1]) and mean and standard deviation of the latents."""
    latents = encode(model, pool.images)
    error = (to_signed(decode(model, latents)) - to_signed(pool.images)).square().mean()
    return {
        "reconstruction_mse": round(error.item(), 6),
        "latent_mean": round(latents.mean().item(), 4),
        "latent_std": round(latents.std().item(), 4),
    }


def _in_batches(function: Callable[[Tensor], Tensor], values: Tensor, size: int = 256) -> Tensor:
    return torch.cat([function(part) for part in values.split(size)])
