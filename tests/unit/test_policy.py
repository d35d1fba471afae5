"""The policy: errors in one line, packing, and independence of the batch."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_flux import refusal

from g2rpo.config import validate
from g2rpo.policy import Conditioning, Policy, PolicyConfig, export_pipeline, load_policy
from g2rpo.policy.conditioning import row_of

PROMPTS = ["a red square", "a blue circle on the left", "", "two triangles"]


@pytest.fixture
def broken(flux_folder: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline flux_folder for a test to damage."""
    return Path(shutil.copytree(flux_folder, tmp_path / "pipeline"))


@pytest.fixture(scope="module")
def policy(flux_folder: Path) -> Policy:
    return load(flux_folder)


def load(source: Path | str, device: str = "cpu", **changes: object) -> Policy:
    values = {"source": str(source), "resolution": 32, "max_sequence_length": 32} | changes
    return load_policy(validate(PolicyConfig, values, "policy"), device)


# Mistakes


def test_folders_that_are_no_pipeline_of_flux(broken: Path, tmp_path: Path) -> None:
    line = refusal(lambda: load(tmp_path / "nowhere"))
    assert "nowhere" in line and "no such folder" in line
    assert "no model_index.json" in refusal(lambda: load(tmp_path))
    index = json.loads((broken / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionXLPipeline"
    (broken / "model_index.json").write_text(json.dumps(index))
    assert "StableDiffusionXLPipeline" in refusal(lambda: load(broken))


def test_every_missing_part_is_named(broken: Path) -> None:
    shutil.rmtree(broken / "text_encoder_2")
    (broken / "vae" / "config.json").unlink()
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (broken / "tokenizer" / "tokenizer.json").unlink()
    line = refusal(lambda: load(broken))
    for part in ("text_encoder_2/", "vae/config.json", "transformer/*.safetensors", "tokenizer/"):
        assert part in line


def test_missing_shard_is_named(broken: Path) -> None:
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    transformer = broken / "transformer"
    (transformer / "diffusion_pytorch_model.safetensors").rename(transformer / "part-1.safetensors")
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    line = refusal(lambda: load(broken))
    assert "transformer/part-2.safetensors" in line and "part-1" not in line


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
def test_damaged_weights(broken: Path, component: str) -> None:
    weights = next((broken / component).glob("*.safetensors"))
    tensors = load_file(weights)
    name = sorted(tensors)[len(tensors) // 2]
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    # The libraries would fill the tensor with random numbers.
    assert name.split(".")[-2] in refusal(lambda: load(broken).encode(PROMPTS))
    weights.write_bytes(weights.read_bytes()[:1000])
    line = refusal(lambda: load(broken).encode(PROMPTS))
    assert f"/{component}:" in line and "again" in line


def test_tokenizer_of_another_model(broken: Path) -> None:
    config = json.loads((broken / "text_encoder" / "config.json").read_text())
    weights = broken / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if key.endswith("token_embedding.weight"))
    tensors[name] = tensors[name][:100].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    config |= {"vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 99}
    (broken / "text_encoder" / "config.json").write_text(json.dumps(config))
    assert "embeds only 100" in refusal(lambda: load(broken).encode(PROMPTS))


def test_hub_id_that_is_not_cached_while_offline() -> None:
    line = refusal(lambda: load("nobody/no-such-flux"))
    assert "nobody/no-such-flux" in line and "HF_HUB_OFFLINE" in line


def test_hub_snapshot_is_loaded_like_a_folder(
    monkeypatch: pytest.MonkeyPatch, flux_folder: Path
) -> None:
    asked = {}

    def fetch(source: str, **options: object) -> str:
        asked.update(options, source=source)
        return str(flux_folder)

    monkeypatch.setattr("g2rpo.hub.fetch.snapshot_download", fetch)
    loaded = load("owner/flux", revision="main")
    assert loaded.folder == flux_folder
    assert (asked["source"], asked["revision"]) == ("owner/flux", "main")
    assert "transformer/*" in asked["allow_patterns"]


def test_impossible_settings(flux_folder: Path) -> None:
    for key in ("resolution", "height", "width"):
        line = refusal(lambda key=key: load(flux_folder, **{key: 40}))
        assert line.startswith(f"{key} 40 is not divisible by 16") and line.endswith("nearest: 32")
    for key, value in (
        ("max_sequence_length", 513), ("resolution", 0), ("dtype", "float16"), ("guidance", 1.0),
    ):  # fmt: skip
        assert key in refusal(lambda key=key, value=value: load(flux_folder, **{key: value}))
    assert "use cpu or cuda" in refusal(lambda: load(flux_folder, device="gpu"))
    if not torch.cuda.is_available():
        assert "no usable CUDA GPU" in refusal(lambda: load(flux_folder, device="cuda"))


def test_a_policy_is_verified_once(flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export's checksums cover all weights, which takes minutes at FLUX's size."""
    verified: list[Path] = []
    monkeypatch.setattr("g2rpo.policy.folder.check_exported", verified.append)
    load(flux_folder)
    assert verified == [flux_folder]


def test_transformer_of_another_architecture(policy: Policy, tmp_path: Path) -> None:
    other = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    other.save_pretrained(tmp_path / "other")
    assert "num_layers=1" in refusal(lambda: policy.load_transformer(tmp_path / "other"))
    assert "no such folder" in refusal(lambda: policy.load_transformer(tmp_path / "none"))
    line = refusal(lambda: policy.load_transformer(policy.folder / "vae"))
    assert "in_channels" in line or "AutoencoderKL" in line


def test_export_does_not_overwrite_its_base(broken: Path) -> None:
    base = load(broken)
    assert "another folder" in refusal(lambda: export_pipeline(base, broken))
    assert "another folder" in refusal(lambda: export_pipeline(base, broken.parent))
    assert (broken / "model_index.json").is_file()


# Text


def test_truncated_prompts_are_reported(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="g2rpo"):
        policy.encode(PROMPTS)
        assert not caplog.records
        # 44 and 117 characters: T5 cuts both at 32 tokens, CLIP only the second at 77.
        policy.encode(["a circle", "a " + "blue " * 8 + "wheel", "a " + "blue " * 23 + "wheel"])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("2 of 3 prompts are truncated to the 32 tokens of T5")
    assert messages[1].startswith("1 of 3 prompts are truncated to the 77 tokens of CLIP")


def assert_same_bits(one: Conditioning, other: Conditioning) -> None:
    assert torch.equal(one.prompt_embeds, other.prompt_embeds)
    assert torch.equal(one.pooled_prompt_embeds, other.pooled_prompt_embeds)


def test_an_embedding_depends_on_its_prompt_alone(policy: Policy) -> None:
    together = policy.encode(PROMPTS)
    assert len(together) == len(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        assert_same_bits(policy.encode([prompt]), together.select([index]))
    assert_same_bits(policy.encode(PROMPTS[::-1] * 12), together.select([3, 2, 1, 0] * 12))
    threads = torch.get_num_threads()
    try:
        for number in (2, 5):
            torch.set_num_threads(number)
            assert_same_bits(policy.encode(PROMPTS), together)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)


class Remembered:
    """A source that holds some prompts."""

    def __init__(self, conditioning: Conditioning, prompts: list[str]) -> None:
        self.rows = {prompt: row_of(conditioning, i) for i, prompt in enumerate(prompts)}

    def read(self, prompts: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        return {prompt: self.rows[prompt] for prompt in prompts if prompt in self.rows}


def test_what_a_source_holds_is_not_encoded(
    flux_folder: Path, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    encoded = policy.encode(PROMPTS)
    reader = load(flux_folder)
    reader.conditioning_source = Remembered(encoded, PROMPTS)
    assert_same_bits(reader.encode([*PROMPTS[::-1], PROMPTS[1]]), encoded.select([3, 2, 1, 0, 1]))
    assert reader.text_encoders is None
    assert not caplog.records

    reader.conditioning_source = Remembered(encoded, PROMPTS[:2])
    with caplog.at_level(logging.WARNING, logger="g2rpo"):
        for _ in range(2):
            assert_same_bits(reader.encode(PROMPTS), encoded)
    assert [record.getMessage().split(" are")[0] for record in caplog.records] == ["2 of 4 prompts"]


def test_conditioning_selects_and_joins() -> None:
    conditioning = Conditioning(torch.randn(3, 4, 5), torch.randn(3, 6))
    chosen = conditioning.select(torch.tensor([2, 0, 2]))
    assert torch.equal(chosen.prompt_embeds, conditioning.prompt_embeds[[2, 0, 2]])
    assert torch.equal(chosen.pooled_prompt_embeds, conditioning.pooled_prompt_embeds[[2, 0, 2]])
    joined = Conditioning.cat([conditioning.select([0]), conditioning.select([1, 2])])
    assert torch.equal(joined.prompt_embeds, conditioning.prompt_embeds)
    with pytest.raises(ValueError, match="differ in length"):
        Conditioning(torch.randn(3, 4, 5), torch.randn(2, 6))


# Latents


def test_velocity_does_not_depend_on_the_batch(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(3)
    conditioning = policy.encode(PROMPTS)
    latents = policy.pack(torch.randn(4, *policy.latent_shape, generator=generator))
    times = torch.tensor([1.0, 0.75, 0.3, 0.02])
    with torch.no_grad():
        together = policy.velocity(latents, times, conditioning)
        alone = torch.cat(
            [policy.velocity(latents[[i]], times[[i]], conditioning.select([i])) for i in range(4)]
        )
    assert together.dtype == torch.float32
    assert together.std() >= 0.5
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_gradients_reach_the_transformer_only(flux_folder: Path) -> None:
    policy = load(flux_folder)
    conditioning = policy.encode(PROMPTS)
    latents = policy.pack(torch.randn(4, *policy.latent_shape)).requires_grad_()
    velocity = policy.velocity(latents, torch.full((4,), 0.6), conditioning)
    velocity.square().mean().backward()
    without = [
        name
        for name, parameter in policy.transformer.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    # A key's bias shifts all scores of a query alike, so its gradient is rounding noise or zero.
    assert [name for name in without if not name.endswith(("to_k.bias", "add_k_proj.bias"))] == []
    assert latents.grad is not None
    assert not conditioning.prompt_embeds.requires_grad
    encoders = policy.text_encoders
    assert encoders is not None
    for frozen in (policy.vae, encoders.clip, encoders.t5):
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not policy.decode(latents).requires_grad


def test_wrapped_transformer_is_used_and_saved(flux_folder: Path, tmp_path: Path) -> None:
    policy = load(flux_folder)
    conditioning = policy.encode(PROMPTS[:1])
    latents, time = torch.randn(1, 4, 64), torch.tensor([0.5])
    with torch.no_grad():
        expected = policy.velocity(latents, time, conditioning)
        bare = policy.transformer
        policy.transformer = torch.nn.DataParallel(bare)
        assert torch.equal(policy.velocity(latents, time, conditioning), expected)
        policy.save_transformer(tmp_path / "saved")
        bare.proj_out.weight.zero_()
        policy.load_transformer(tmp_path / "saved")
        assert torch.equal(policy.velocity(latents, time, conditioning), expected)
    saved = load_file(tmp_path / "saved" / "diffusion_pytorch_model.safetensors")
    assert set(saved) == set(bare.state_dict())


def test_decoding_does_not_depend_on_the_slices(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(5, 4, 64, generator=torch.Generator().manual_seed(2))
    whole = policy.decode(latents)
    monkeypatch.setattr("g2rpo.policy.decoding.DECODE_IMAGES", 2)
    sliced = policy.decode(latents)
    assert whole.shape == sliced.shape == (5, 32, 32, 3)
    difference = (whole.int() - sliced.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3
    assert policy.decode(latents[:0]).shape == (0, 32, 32, 3)


def test_bfloat16_parameters_leave_latents_in_float32(flux_folder: Path) -> None:
    policy = load(flux_folder, dtype="bfloat16")
    assert {p.dtype for p in policy.transformer.parameters()} == {torch.bfloat16}
    conditioning = policy.encode(PROMPTS[:2])
    velocity = policy.velocity(torch.randn(2, 4, 64), torch.tensor([0.9, 0.2]), conditioning)
    assert velocity.dtype == torch.float32
    assert torch.isfinite(velocity).all()
