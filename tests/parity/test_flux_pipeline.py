"""Our forward pass against diffusers' FluxPipeline, on the same folder, noise and sigmas."""

import io
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from tiny_flux import build_tiny_flux
from torch import Tensor

from g2rpo.flow.schedule import GridConfig, build_grid
from g2rpo.policy import Policy, PolicyConfig, export_pipeline, load_policy

PROMPTS = ["a red circle above a small blue square", "two green triangles"]
HEIGHT, WIDTH = 48, 80
LENGTH = 48
GUIDANCE = 2.0
STEPS = 6
Schedule = Literal["shifted", "flux_dynamic"]


@pytest.fixture(scope="module")
def policy(flux_folder: Path) -> Policy:
    return policy_of(flux_folder)


@pytest.fixture(scope="module")
def pipeline(flux_folder: Path) -> FluxPipeline:
    return load_pipeline(flux_folder)


def policy_of(folder: Path) -> Policy:
    config = PolicyConfig(
        source=str(folder),
        height=HEIGHT,
        width=WIDTH,
        guidance_scale=GUIDANCE,
        max_sequence_length=LENGTH,
    )
    return load_policy(config, "cpu")


def load_pipeline(folder: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    # The pipeline's own scheduler would shift even the sigmas that it is handed.
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    return pipeline


def noise_of(policy: Policy) -> Tensor:
    shape = (len(PROMPTS), *policy.latent_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def sample(policy: Policy, schedule: Schedule = "shifted") -> Tensor:
    """Euler steps on a grid, with exact timesteps."""
    config = GridConfig(steps=STEPS, schedule=schedule, timestep="exact")
    grid = build_grid(config, policy.image_tokens)
    conditioning = policy.encode(PROMPTS)
    latents = policy.pack(noise_of(policy))
    for step in range(STEPS):
        time = torch.full((len(PROMPTS),), grid.timesteps[step])
        velocity = policy.velocity(latents, time, conditioning)
        latents = latents + velocity * (grid.sigmas[step + 1] - grid.sigmas[step])
    return latents


def pipeline_images(
    pipeline: FluxPipeline,
    policy: Policy,
    output_type: str,
    schedule: Schedule = "shifted",
) -> list[object]:
    # No sigmas: the pipeline makes its own.
    grid = build_grid(GridConfig(steps=STEPS), policy.image_tokens)
    output = pipeline(
        PROMPTS,
        height=HEIGHT,
        width=WIDTH,
        sigmas=list(grid.sigmas[:-1]) if schedule == "shifted" else None,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=LENGTH,
        latents=policy.pack(noise_of(policy)),
        output_type=output_type,
    )
    return list(output.images)


def unit_images(policy: Policy, latents: Tensor) -> Tensor:
    """[B, H, W, 3] in [0, 1] before rounding, straight from the autoencoder."""
    scaling, shift = policy.vae.config.scaling_factor, policy.vae.config.shift_factor
    with torch.no_grad():
        decoded = policy.vae.decode(policy.unpack(latents) / scaling + shift).sample
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def test_encode_equals_encode_prompt(policy: Policy, pipeline: FluxPipeline) -> None:
    # One of them is truncated.
    prompts = [f"{prompt} number {i}" for i in range(3) for prompt in PROMPTS] + ["long " * 40]
    with torch.no_grad():
        sequence, pooled, text_ids = pipeline.encode_prompt(prompts, max_sequence_length=LENGTH)
    ours = policy.encode(prompts)
    torch.testing.assert_close(ours.prompt_embeds, sequence, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooled_prompt_embeds, pooled, atol=1e-5, rtol=0)
    assert torch.equal(policy._text_position_ids(LENGTH), text_ids)
    assert not torch.allclose(ours.prompt_embeds[0], ours.prompt_embeds[1], atol=1e-2)


def test_packing_and_position_ids_equal_the_pipeline(
    policy: Policy, pipeline: FluxPipeline
) -> None:
    noise = noise_of(policy)
    channels, height, width = policy.latent_shape
    packed = pipeline._pack_latents(noise, len(noise), channels, height, width)
    assert torch.equal(policy.pack(noise), packed)
    unpacked = pipeline._unpack_latents(packed, HEIGHT, WIDTH, pipeline.vae_scale_factor)
    assert torch.equal(policy.unpack(packed), unpacked)
    ids = pipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    assert torch.equal(policy.image_ids, ids)


def test_same_image_as_the_pipeline(policy: Policy, pipeline: FluxPipeline) -> None:
    theirs = np.stack(pipeline_images(pipeline, policy, "np"))
    latents = sample(policy)
    ours = unit_images(policy, latents).numpy()
    assert ours.std() > 0.1, "flat images would agree whatever the sampler did"
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_same_image_on_the_pipelines_own_grid(policy: Policy, flux_folder: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(flux_folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = np.stack(pipeline_images(pipeline, policy, "np", "flux_dynamic"))
    ours = unit_images(policy, sample(policy, "flux_dynamic")).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert np.abs(ours - unit_images(policy, sample(policy)).numpy()).max() > 1e-2


def test_decoded_bytes_are_those_of_a_saved_png(policy: Policy, pipeline: FluxPipeline) -> None:
    saved = []
    for image in pipeline_images(pipeline, policy, "pil"):
        file = io.BytesIO()
        image.save(file, format="PNG")
        saved.append(np.asarray(Image.open(file)))
    theirs = np.stack(saved).astype(int)
    decoded = policy.decode(sample(policy))
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (len(PROMPTS), HEIGHT, WIDTH, 3)
    difference = np.abs(decoded.numpy().astype(int) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_export_is_a_pipeline_with_the_trained_transformer(
    policy: Policy, flux_folder: Path, tmp_path: Path
) -> None:
    trained = policy_of(flux_folder)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in trained.transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    export_pipeline(trained, tmp_path / "exported")
    ours = unit_images(trained, sample(trained)).numpy()
    exported = load_pipeline(tmp_path / "exported")
    theirs = np.stack(pipeline_images(exported, trained, "np"))
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    base = unit_images(policy, sample(policy)).numpy()
    assert np.abs(ours - base).mean() > 1e-2, "another transformer must give another image"
    for name in ("vae", "text_encoder", "text_encoder_2"):
        files = sorted((flux_folder / name).iterdir())
        assert files
        for file in files:
            assert (tmp_path / "exported" / name / file.name).read_bytes() == file.read_bytes()


def test_without_guidance_embedding_the_pipeline_still_agrees(tmp_path: Path) -> None:
    folder = build_tiny_flux(tmp_path / "schnell", guidance_embeds=False)
    policy = policy_of(folder)
    theirs = np.stack(pipeline_images(load_pipeline(folder), policy, "np"))
    ours = unit_images(policy, sample(policy)).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_bfloat16_bytes_follow_diffusers_rounding(flux_folder: Path, policy: Policy) -> None:
    config = policy.config.model_copy(update={"dtype": "bfloat16"})
    half = load_policy(config, "cpu")
    latents = sample(policy)
    decoded = half.decode(latents)
    pipeline = FluxPipeline.from_pretrained(flux_folder, torch_dtype=torch.bfloat16)
    scaled = half.unpack(latents) / half.vae.config.scaling_factor + half.vae.config.shift_factor
    with torch.no_grad():
        raw = pipeline.vae.decode(scaled.bfloat16(), return_dict=False)[0]
    expected = pipeline.image_processor.postprocess(raw, output_type="pil")
    assert np.array_equal(decoded.numpy(), np.stack([np.asarray(image) for image in expected]))
