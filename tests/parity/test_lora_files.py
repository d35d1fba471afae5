"""A LoRA from elsewhere samples here what diffusers or PEFT samples with it."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_flux import build_tiny_flux
from tiny_sd3 import build_tiny_sd3
from torch import Tensor, nn

from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.flow.schedule import GridConfig, build_grid
from g2rpo.policy import CheckpointConfig, Policy, PolicyConfig, load_policy
from g2rpo.policy.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE, LORA_FILE, find_checkpoint
from g2rpo.policy.load import check_checkpoint
from g2rpo.sampling import evaluation_noise, sample_latents

PROMPTS = [Prompt("0", "a red circle"), Prompt("1", "two green triangles")]
SIZE, LENGTH, STEPS, SEED = 32, 32, 4, 7
GRIDS = {"flux": "flux_dynamic", "sd3": "sd3"}
SETTINGS = {"r": 4, "lora_alpha": 10, "target_modules": ["attn.to_q", "attn.to_out.0"]}
UNEVEN = SETTINGS | {
    "rank_pattern": {"transformer_blocks.0.attn.to_q": 2},
    "alpha_pattern": {"transformer_blocks.0.attn.to_q": 3},
}


@pytest.fixture(scope="module", params=["flux", "sd3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = {"flux": build_tiny_flux, "sd3": build_tiny_sd3}[request.param]
    return build(tmp_path_factory.mktemp("base") / request.param)


def config_of(folder: Path, dtype: str = "float32") -> PolicyConfig:
    settings: Any = {"source": str(folder), "resolution": SIZE, "max_sequence_length": LENGTH}
    return PolicyConfig(**settings, dtype=dtype)


def ours(folder: Path, lora: Path | None) -> Tensor:
    policy = load_policy(config_of(folder), "cpu")
    if lora is not None:
        load(policy, lora)
    return sampled(policy, folder.name)


def sampled(policy: Policy, kind: str) -> Tensor:
    grid = build_grid(
        GridConfig.model_validate({"steps": STEPS, "schedule": GRIDS[kind], "timestep": "exact"}),
        policy.image_tokens,
    )
    return sample_latents(policy, PROMPTS, grid, SEED)


def load(policy: Policy, lora: Path) -> None:
    policy.load_checkpoint(find_checkpoint(CheckpointConfig(source=str(lora))))


def theirs(folder: Path, attach: Callable[[Any], None]) -> Tensor:
    """The latents of diffusers' pipeline with a LoRA that is attached as its users do."""
    policy = load_policy(config_of(folder), "cpu")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    attach(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        [prompt.text for prompt in PROMPTS],
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        max_sequence_length=LENGTH,
        latents=torch.stack([evaluation_noise(policy, SEED, prompt) for prompt in PROMPTS]),
        output_type="latent",
    )
    return output.images


def adapted(folder: Path, settings: dict[str, Any]) -> nn.Module:
    """The base's transformer as PEFT's model, its adapters moved away from zero."""
    transformer = AutoModel.from_pretrained(str(folder), subfolder="transformer")
    model = peft.get_peft_model(transformer, peft.LoraConfig(**settings))
    draws = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draws)
    return model


def peft_lora(folder: Path, output: Path, settings: dict[str, Any] = SETTINGS) -> Path:
    adapted(folder, settings).save_pretrained(output)
    assert {path.name for path in output.iterdir()} >= {ADAPTER_FILE, ADAPTER_CONFIG}
    return output


def diffusers_lora(folder: Path, output: Path) -> Path:
    """A file without metadata, as most published ones are."""
    lora = load_file(peft_lora(folder, output / "peft") / ADAPTER_FILE)
    named = {key.replace("base_model.model.", "transformer."): lora[key] for key in lora}
    save_file(named, output / LORA_FILE)
    return output / LORA_FILE


@pytest.mark.parametrize("settings", [SETTINGS, UNEVEN, SETTINGS | {"use_rslora": True}])
def test_a_peft_adapter_samples_what_peft_samples(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    lora = peft_lora(folder, tmp_path / "lora", settings)

    def attach(pipeline: Any) -> None:
        pipeline.transformer = peft.PeftModel.from_pretrained(
            pipeline.transformer, lora
        ).merge_and_unload()

    found = ours(folder, lora)
    assert (found - ours(folder, None)).abs().max() > 0.1
    torch.testing.assert_close(found, theirs(folder, attach), rtol=0, atol=1e-4)


def test_a_file_of_diffusers_samples_what_its_pipeline_samples(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = diffusers_lora(folder, tmp_path)

    def attach(pipeline: Any) -> None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)

    with caplog.at_level(logging.WARNING, logger="g2rpo"):
        found = ours(folder, lora)
    assert "no alpha; it is taken for the rank" in caplog.text
    assert (found - ours(folder, None)).abs().max() > 0.1
    torch.testing.assert_close(found, theirs(folder, attach), rtol=0, atol=1e-4)


def test_a_lora_over_bfloat16_is_not_rounded(folder: Path, tmp_path: Path) -> None:
    lora = peft_lora(folder, tmp_path / "lora")
    policy = load_policy(config_of(folder, "bfloat16"), "cpu")
    load(policy, lora)
    saved = load_file(lora / ADAPTER_FILE)
    held = [p for n, p in policy.transformer.named_parameters() if ".lora_" in n]
    assert len(held) == len(saved) and all(p.dtype == torch.float32 for p in held)
    assert not any(p.requires_grad for p in policy.transformer.parameters())
    assert {p.detach().sum().item() for p in held} == {p.sum().item() for p in saved.values()}


def renamed(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("to_q", "to_z").replace("to_out", "to_in"): lora[key] for key in lora}


def widened(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.ones(v.shape[0] + 1, v.shape[1]) if "B" in k else v for k, v in lora.items()}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no layer": (renamed, "is unknown (0 tensors missing"),
    "one half": (
        lambda s: {k: v for k, v in s.items() if "lora_A" in k},
        "lora_B.weight is missing",
    ),
    "shape": (widened, "expected ["),
    "text encoder": (
        lambda s: s | {"text_encoder.q.lora_A.weight": torch.ones(4, 8)},
        "is unknown",
    ),
    "magnitudes": (
        lambda s: s | {f"{k}.lora_magnitude_vector": v.clone() for k, v in s.items()},
        "unknown",
    ),
    "Kohya's names": (lambda s: {"lora_unet_0.lora_down.weight": torch.ones(4, 8)}, "is unknown"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_a_lora_that_does_not_fit_is_reported_in_one_line(
    folder: Path, tmp_path: Path, case: str
) -> None:
    change, message = WRONG[case]
    lora = diffusers_lora(folder, tmp_path)
    save_file(change(load_file(lora)), lora)
    files = find_checkpoint(CheckpointConfig(source=str(lora)))
    policy = load_policy(config_of(folder), "cpu")
    before = policy.transformer.state_dict().keys()
    for action in (
        lambda: policy.load_checkpoint(files),
        lambda: check_checkpoint(config_of(folder), files),
    ):
        with pytest.raises(UserError) as caught:
            action()
        line = str(caught.value)
        assert message in line and LORA_FILE in line and "\n" not in line
    assert policy.transformer.state_dict().keys() == before


def test_a_lora_of_another_architecture_is_reported(folder: Path, tmp_path: Path) -> None:
    build = build_tiny_sd3 if folder.name == "flux" else build_tiny_flux
    other = build(tmp_path / "other")
    settings = SETTINGS | {"target_modules": ["attn.to_q", "norm_out.linear"]}
    files = find_checkpoint(
        CheckpointConfig(source=str(peft_lora(other, tmp_path / "l", settings)))
    )
    with pytest.raises(UserError, match="use a LoRA for"):
        check_checkpoint(config_of(folder), files)
    check_checkpoint(config_of(other), files)


def test_a_peft_adapter_needs_its_configuration(folder: Path, tmp_path: Path) -> None:
    lora = peft_lora(folder, tmp_path / "lora")
    policy = load_policy(config_of(folder), "cpu")
    stated = json.loads((lora / ADAPTER_CONFIG).read_text())
    (lora / ADAPTER_CONFIG).write_text(json.dumps(stated | {"r": 8}))
    with pytest.raises(UserError, match="has shape"):
        load(policy, lora)
    (lora / ADAPTER_CONFIG).unlink()
    with pytest.raises(UserError, match="no adapter_config"):
        load(load_policy(config_of(folder), "cpu"), lora)


def test_a_lora_that_changes_nothing_is_told(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = diffusers_lora(folder, tmp_path)
    save_file({k: v * ("lora_A" in k) for k, v in load_file(lora).items()}, lora)
    with caplog.at_level(logging.WARNING, logger="g2rpo"):
        assert torch.equal(ours(folder, lora), ours(folder, None))
    assert "changes nothing" in caplog.text
