"""The smoke profile's assets: every model class at toy size with random weights, built offline.

Default initialisations give velocities near 0, gray images and a constant ImageReward score. So
all weights are redrawn at a scale that preserves signals from layer to layer, and velocities and
pixels are scaled to a realistic size.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.mini_world import attribute_training, autoencoder, base_policy, world
from benchmarks.mini_world.reward_training import MODELS
from benchmarks.mini_world.small_policies import FluxSettings, SD3Settings, build_flux, build_sd3
from benchmarks.mini_world.small_rewards import liven
from benchmarks.mini_world.tokenizers import words
from g2rpo.files import atomic_folder, atomic_write_text
from g2rpo.progress import without_library_bars
from g2rpo.rewards.attributes import AttributeReader

PROMPTS = {"train": 16, "validation": 4, "test": 8}
VERSION = "3"
"""Changes with the models, so that old folders are rebuilt."""
VELOCITY_STD = 1.0
PIXEL_STD = 0.6


def build_tiny_models(folder: Path, seed: int = 0) -> Path:
    """Builds ``policy/``, ``rewards/<name>/``, ``prompts/<split>.txt`` and ``sd3_policy/``.

    The first policy is a FLUX, the last one a Stable Diffusion 3.5.

    A folder built earlier with this seed is kept. The build is atomic.

    Returns:
        ``folder``.
    """
    mark = f"tiny models {VERSION}, seed {seed}\n"
    done = folder / "BUILT"
    if done.is_file() and done.read_text() == mark:
        return folder
    with (
        without_library_bars(),
        torch.random.fork_rng(devices=[]),
        atomic_folder(folder) as temporary,
    ):
        torch.manual_seed(seed)
        flux = FluxSettings(double_blocks=1, single_blocks=1, heads=2, head_width=16, text_width=32)
        _save_policy(build_flux(flux, temporary / "policy"), temporary / "policy")
        for name, build in MODELS.items():
            reward = build(words())
            liven(reward)
            reward.eval().save(temporary / "rewards" / name)
        settings = attribute_training.AttributeSettings(widths=(8, 16, 16))
        reader = AttributeReader(attribute_training.reader_config(settings))
        liven(reader)
        reader.eval().save(temporary / "rewards" / "attributes")
        for split, number in PROMPTS.items():
            captions = world.make_captions(seed, split, number)
            text = "".join(caption + "\n" for caption in captions)
            atomic_write_text(temporary / "prompts" / f"{split}.txt", text)
        sd3 = SD3Settings(blocks=2, dual_attention_blocks=1, heads=2, head_width=16, clip_width=16)
        _save_policy(build_sd3(sd3, temporary / "sd3_policy"), temporary / "sd3_policy")
        atomic_write_text(temporary / "BUILT", mark)
    return folder


def _save_policy(policy: base_policy.Policy, folder: Path) -> None:
    vae = autoencoder.build(autoencoder.AutoencoderSettings(channels=(8, 16, 16)))
    for module in (*policy.trained().children(), vae):
        liven(module)
        module.eval()
    _scale_velocity(policy)
    _scale_pixels(vae)
    policy.pipeline(vae).save_pretrained(folder, safe_serialization=True)


@torch.no_grad()
def _scale_velocity(policy: base_policy.Policy) -> None:
    """Gives velocities a standard deviation of :data:`VELOCITY_STD`."""
    captions = ["a red circle on black", "two large blue stars on gray"] * 4
    side = base_policy.LATENT_SIDE
    packed = policy.pack(torch.empty(len(captions), base_policy.LATENT_CHANNELS, side, side))
    latents = torch.randn_like(packed)
    sigma = torch.linspace(0.1, 1.0, len(captions))
    velocity = policy.velocity(latents, sigma, policy.tokens(captions))
    transformer: Any = policy.trained()["transformer"]
    transformer.proj_out.weight.mul_(VELOCITY_STD / velocity.std())
    transformer.proj_out.bias.zero_()


@torch.no_grad()
def _scale_pixels(vae: AutoencoderKL) -> None:
    """Gives decoded images a standard deviation of :data:`PIXEL_STD` around gray."""
    latents = torch.randn(8, 16, base_policy.LATENT_SIDE, base_policy.LATENT_SIDE)
    pixels: Tensor = vae.decode(latents).sample
    vae.decoder.conv_out.weight.mul_(PIXEL_STD / pixels.std())
    vae.decoder.conv_out.bias.zero_()
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
