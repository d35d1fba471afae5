"""Our forward pass against diffusers' StableDiffusion3Pipeline, on the same folder and noise."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny_sd3 import CLIP_WIDTHS, build_tiny_sd3
from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.flow.schedule import GridConfig, build_grid, shifted_sigmas
from g2rpo.policy import (
    Conditioning,
    LoraConfig,
    Policy,
    PolicyConfig,
    export_pipeline,
    load_policy,
)
from g2rpo.policy.config import ImageConfig
from g2rpo.policy.folder import check_pipeline_folder, text_fingerprint
from g2rpo.policy.kernels import compile_blocks, is_compiled

PROMPTS = ["a red circle above a small blue square", "two green triangles"]
HEIGHT, WIDTH, LENGTH, STEPS = 48, 80, 48, 6
SIGMAS = shifted_sigmas(STEPS, 3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sd3(tmp_path_factory.mktemp("sd3") / "pipeline")


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return policy_of(folder)


def policy_of(folder: Path, guidance: float = 1.0) -> Policy:
    config = PolicyConfig(
        source=str(folder),
        height=HEIGHT,
        width=WIDTH,
        guidance_scale=guidance,
        max_sequence_length=LENGTH,
    )
    return load_policy(config, "cpu")


def at(policy: Policy, guidance: float, height: int = HEIGHT, width: int = WIDTH) -> Policy:
    return policy.at(ImageConfig(height=height, width=width, guidance_scale=guidance))


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    absent = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None}
    absent |= {name.replace("text_encoder", "tokenizer"): None for name in absent}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(policy: Policy) -> Tensor:
    shape = (len(PROMPTS), *policy.latent_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def sample(policy: Policy, sigmas: tuple[float, ...] = SIGMAS) -> Tensor:
    """Images [B, H, W, 3] in [0, 1] before rounding, by Euler steps."""
    conditioning, latents = policy.encode(PROMPTS), policy.pack(noise_of(policy))
    for sigma, after in itertools.pairwise(sigmas):
        velocity = policy.velocity(latents, torch.full((len(PROMPTS),), sigma), conditioning)
        latents = latents + velocity * (after - sigma)
    scaling, shift = policy.vae.config.scaling_factor, policy.vae.config.shift_factor
    decoded = policy.vae.decode(policy.unpack(latents) / scaling + shift).sample
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def images_of(
    pipeline: StableDiffusion3Pipeline,
    policy: Policy,
    guidance: float = 1.0,
    *,
    own_grid: bool = False,
) -> np.ndarray:
    if not own_grid:
        pipeline.scheduler.set_shift(1.0)  # it would shift even the sigmas that it is handed
    output = pipeline(
        PROMPTS,
        height=HEIGHT,
        width=WIDTH,
        sigmas=None if own_grid else list(SIGMAS[:-1]),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        max_sequence_length=LENGTH,
        latents=noise_of(policy),
        output_type="np",
    )
    return output.images


@pytest.mark.parametrize("with_t5", [True, False])
def test_encode_equals_encode_prompt(tmp_path: Path, *, with_t5: bool) -> None:
    folder = build_tiny_sd3(tmp_path / "pipeline", with_t5=with_t5)
    policy, pipeline = policy_of(folder), load_pipeline(folder)
    # One of them is truncated.
    prompts = [f"{prompt} number {i}" for i in range(3) for prompt in PROMPTS] + ["long " * 40]
    with torch.no_grad():
        sequence, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, max_sequence_length=LENGTH, do_classifier_free_guidance=False
        )
    ours = policy.encode(prompts)
    assert ours.prompt_embeds.shape[1] == 77 + LENGTH
    torch.testing.assert_close(ours.prompt_embeds, sequence, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooled_prompt_embeds, pooled, atol=1e-5, rtol=0)
    assert not torch.allclose(ours.prompt_embeds[0], ours.prompt_embeds[1], atol=1e-2)
    assert bool(ours.prompt_embeds[:, 77:].any()) == with_t5
    with torch.no_grad():
        _, sequence, _, pooled = pipeline.encode_prompt(
            PROMPTS, None, None, max_sequence_length=LENGTH
        )
    empty = policy.empty().expand(len(PROMPTS))
    torch.testing.assert_close(empty.prompt_embeds, sequence, atol=1e-5, rtol=0)
    torch.testing.assert_close(empty.pooled_prompt_embeds, pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("guidance", [0.5, 1.0, 4.5])
def test_same_image_as_the_pipeline(policy: Policy, folder: Path, guidance: float) -> None:
    guided = at(policy, guidance)
    assert guided.evaluations_per_velocity == (2 if guidance > 1 else 1)
    theirs, ours = images_of(load_pipeline(folder), policy, guidance), sample(guided).numpy()
    assert ours.std() > 0.1, "flat images would agree whatever the sampler did"
    assert np.abs(ours[0] - ours[1]).max() > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    same = np.abs(ours - sample(policy).numpy()).max() < 1e-6
    assert same == (guidance <= 1)


def test_same_image_on_the_pipelines_own_grid(policy: Policy, folder: Path) -> None:
    theirs = images_of(load_pipeline(folder), policy, 4.5, own_grid=True)
    grid = build_grid(GridConfig(steps=STEPS, schedule="sd3"), policy.image_tokens)
    guided = at(policy, 4.5)
    np.testing.assert_allclose(sample(guided, grid.sigmas).numpy(), theirs, atol=1e-4, rtol=0)
    assert np.abs(sample(guided).numpy() - theirs).max() > 1e-2


def test_the_gradient_flows_through_both_branches(folder: Path) -> None:
    policy = policy_of(folder, guidance=4.5)
    conditioning, latents = policy.encode(PROMPTS), noise_of(policy).requires_grad_()
    times = torch.tensor([0.9, 0.4])
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))

    def plain(text: Conditioning) -> Tensor:
        return policy.transformer(
            hidden_states=latents,
            encoder_hidden_states=text.prompt_embeds,
            pooled_projections=text.pooled_prompt_embeds,
            timestep=1000 * times,
        ).sample

    trained = [latents, *policy.transformer.parameters()]
    without, given = plain(policy.empty().expand(2)), plain(conditioning)
    expected = without + 4.5 * (given - without)
    velocity = policy.velocity(latents, times, conditioning)
    torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=1e-5)
    ours, both, one = (
        torch.autograd.grad((value * weights).sum(), trained, allow_unused=True, retain_graph=True)
        for value in (velocity, expected, without.detach() + 4.5 * (given - without.detach()))
    )
    for mine, theirs in zip(ours, both, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, atol=1e-5 * scale + 1e-5, rtol=1e-4)
    assert not torch.allclose(ours[0], one[0], rtol=0.1)


def test_guidance_is_added_in_the_dtype_of_the_network(folder: Path) -> None:
    config = policy_of(folder, guidance=4.5).config.model_copy(update={"dtype": "bfloat16"})
    policy = load_policy(config, "cpu")
    conditioning, times = policy.encode(PROMPTS), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        velocity = policy.velocity(noise_of(policy), times, conditioning)
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity, velocity.bfloat16().float())


def test_copies_share_the_empty_prompt(folder: Path) -> None:
    policy = policy_of(folder, guidance=4.5)
    copies = [copy.copy(policy), at(policy, 3.0, 32, 32)]
    policy.encode(PROMPTS)
    assert all(other.empty() is policy.empty() for other in copies)
    unguided = policy_of(folder)
    unguided.encode(PROMPTS)
    assert not unguided.unconditional


@pytest.mark.parametrize("with_t5", [True, False])
def test_export_is_a_pipeline_with_the_trained_transformer(
    policy: Policy, tmp_path: Path, *, with_t5: bool
) -> None:
    trained = policy_of(build_tiny_sd3(tmp_path / "base", with_t5=with_t5))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in trained.transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    export_pipeline(trained, tmp_path / "exported")
    ours = sample(trained).numpy()
    for guidance in (1.0, 4.5):
        theirs = images_of(load_pipeline(tmp_path / "exported"), trained, guidance)
        guided = sample(at(trained, guidance)).numpy()
        np.testing.assert_allclose(guided, theirs, atol=1e-4, rtol=0)
    assert np.abs(ours - sample(policy).numpy()).mean() > 1e-2
    assert (tmp_path / "exported" / "text_encoder_3").is_dir() == with_t5


def test_adapters_load_through_the_pipeline(policy: Policy, folder: Path, tmp_path: Path) -> None:
    adapted = policy_of(folder)
    adapted.add_lora(LoraConfig(rank=4, alpha=8), seed=3)
    with torch.no_grad():
        for name, parameter in adapted.transformer.named_parameters():
            if ".lora_B." in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_lora(tmp_path / "lora")
    pipeline = load_pipeline(folder)
    pipeline.load_lora_weights(tmp_path / "lora")
    ours = sample(adapted).numpy()
    np.testing.assert_allclose(ours, images_of(pipeline, adapted), atol=1e-4, rtol=0)
    assert np.abs(ours - sample(policy).numpy()).mean() > 1e-2


def test_a_folder_needs_t5_only_where_its_index_names_it(folder: Path, tmp_path: Path) -> None:
    without = build_tiny_sd3(tmp_path / "without", with_t5=False)
    check_pipeline_folder(without)
    index = json.loads((folder / "model_index.json").read_text())
    (without / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"text_encoder_3/, tokenizer_3/"):
        check_pipeline_folder(without)


def test_a_null_encoder_gives_other_embeddings(tmp_path: Path) -> None:
    prints = []
    for null in (False, True):
        folder = build_tiny_sd3(tmp_path / str(null))
        if null:  # its files stay
            index = json.loads((folder / "model_index.json").read_text())
            index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
            (folder / "model_index.json").write_text(json.dumps(index))
        prints.append(text_fingerprint(str(folder), None))
    assert prints[0] != prints[1]


def test_every_block_is_compiled(folder: Path) -> None:
    transformer = policy_of(folder).transformer
    processors = {name: type(part) for name, part in transformer.attn_processors.items()}
    compile_blocks(transformer)
    assert all(is_compiled(block) for block in transformer.transformer_blocks)
    assert {n: type(part) for n, part in transformer.attn_processors.items()} == processors


def test_parts_that_do_not_fit(folder: Path, policy: Policy) -> None:
    encoders = policy._encoders()
    with pytest.raises(UserError, match="different models"):
        encoders.check_fit(folder, {"pooled_projection_dim": sum(CLIP_WIDTHS)})
    # Eight patches of 2 x 8 pixels at most.
    assert at(policy, 1.0, 128, 16).latent_shape == (16, 16, 2)
    assert at(policy, 1.0, 16, 128).latent_shape == (16, 2, 16)
    for name, sides in (("height", (144, 16)), ("width", (16, 144))):
        with pytest.raises(UserError, match=f"^{name} 144 is more than the 128"):
            at(policy, 1.0, *sides)
