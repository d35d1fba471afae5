"""Adapters: they begin as nothing, are a file that FluxPipeline loads, and can be switched off."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_flux import refusal
from torch import Tensor

from g2rpo.policy import LoraConfig, Policy, PolicyConfig, load_policy
from g2rpo.policy.checkpoint import LORA_FILE
from g2rpo.policy.lora import lora_parameters

CONFIG = LoraConfig(rank=4, alpha=12)
PROMPTS = ["a red cat", "two blue dogs"]


def load(folder: Path) -> Policy:
    config = PolicyConfig(source=str(folder), resolution=64, max_sequence_length=16)
    return load_policy(config, "cpu")


def inputs(policy: Policy) -> tuple[Tensor, Tensor]:
    noise = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    return policy.pack(noise), torch.tensor([0.9, 0.4])


@torch.no_grad()
def velocity(policy: Policy) -> Tensor:
    return policy.velocity(*inputs(policy), policy.encode(PROMPTS))


@torch.no_grad()
def move(policy: Policy) -> None:
    """As training would: every adapter away from where it began."""
    generator = torch.Generator().manual_seed(2)
    for parameter in lora_parameters(policy.transformer).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_new_adapters_change_nothing_and_are_all_that_is_trained(flux_folder: Path) -> None:
    policy = load(flux_folder)
    before = velocity(policy)
    policy.add_lora(CONFIG, seed=1)
    assert torch.equal(velocity(policy), before)
    adapters = lora_parameters(policy.transformer)
    trained = {n: p for n, p in policy.transformer.named_parameters() if p.requires_grad}
    assert trained.keys() == adapters.keys()
    assert len(adapters) == 2 * (2 * 12 + 2 * 3)  # 12 layers of a double block, 3 of a single one
    for name, parameter in adapters.items():
        if ".lora_A." in name:
            assert float(parameter.detach().std()) == pytest.approx(1 / CONFIG.rank, rel=0.5)
        else:
            assert not parameter.any()


def test_adapters_are_named_by_their_seed(flux_folder: Path) -> None:
    drawn = []
    for seed in (1, 1, 2):
        policy = load(flux_folder)
        policy.add_lora(CONFIG, seed)
        drawn.append(torch.cat([p.flatten() for p in lora_parameters(policy.transformer).values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_flux_pipeline_loads_what_was_saved_with_its_alpha(
    flux_folder: Path, tmp_path: Path
) -> None:
    policy = load(flux_folder)
    base = velocity(policy)
    policy.add_lora(CONFIG)
    move(policy)
    trained = velocity(policy)
    assert (trained - base).abs().max() > 0.1
    policy.save_lora(tmp_path / "lora")
    with safe_open(tmp_path / "lora" / LORA_FILE, "pt") as file:
        (written,) = map(json.loads, set(file.metadata().values()) - {"pt"})
    names = written["transformer.target_modules"]
    assert len(names) > 2 and names == sorted(names)  # the same bytes in every process

    pipeline = FluxPipeline.from_pretrained(flux_folder)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name=LORA_FILE)
    latents, times = inputs(policy)
    prompt_embeds, pooled, text_ids = pipeline.encode_prompt(
        PROMPTS, PROMPTS, max_sequence_length=16
    )
    with torch.no_grad():
        theirs = pipeline.transformer(
            hidden_states=latents,
            timestep=times,
            guidance=torch.full((2,), 3.5),
            pooled_projections=pooled,
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_ids,
            img_ids=policy.image_ids,
            return_dict=False,
        )[0]
    torch.testing.assert_close(theirs, trained, rtol=0, atol=2e-5)  # without alpha: 1 and more

    again = load(flux_folder)
    again.load_lora(tmp_path / "lora")
    assert again.has_lora
    torch.testing.assert_close(velocity(again), trained, rtol=0, atol=2e-5)


def test_disabled_adapters_leave_the_base_and_come_back(flux_folder: Path) -> None:
    policy = load(flux_folder)
    base = velocity(policy)
    policy.add_lora(CONFIG)
    move(policy)
    trained = velocity(policy)
    with policy.lora_disabled():
        assert torch.equal(velocity(policy), base)
    assert torch.equal(velocity(policy), trained)
    assert all(p.requires_grad for p in lora_parameters(policy.transformer).values())


def test_what_does_not_fit_is_refused_in_one_line(flux_folder: Path, tmp_path: Path) -> None:
    policy = load(flux_folder)
    assert "no such LoRA file" in refusal(lambda: policy.load_lora(tmp_path))
    nothing = LoraConfig(target_modules=("attn.to_z",))
    assert "lora.target_modules" in refusal(lambda: load(flux_folder).add_lora(nothing))
    policy.add_lora(CONFIG)
    policy.save_lora(tmp_path / "lora")
    larger = load(flux_folder)
    larger.add_lora(LoraConfig(rank=8))
    assert "another lora.rank" in refusal(lambda: larger.load_lora(tmp_path / "lora"))
    other = load(flux_folder)
    other.add_lora(LoraConfig(rank=4, target_modules=("attn.to_q",)))
    assert "is unknown" in refusal(lambda: other.load_lora(tmp_path / "lora"))

    file = tmp_path / "lora" / LORA_FILE
    save_file(load_file(file), file)  # without its metadata
    file.write_bytes(file.read_bytes()[:50])
    assert "not a readable LoRA file" in refusal(lambda: policy.load_lora(tmp_path / "lora"))
