"""The size of a policy, counted from its configuration, against the modules that it stands for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from tiny_sd3 import build_tiny_sd3
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from g2rpo.errors import UserError
from g2rpo.hub.catalogue import catalogue
from g2rpo.policy import LoraConfig, PolicyConfig, load_policy
from g2rpo.policy.flux_size import FluxSize
from g2rpo.policy.load import policy_class
from g2rpo.policy.lora import add_lora, lora_parameters
from g2rpo.policy.sd3_size import SD3Size
from g2rpo.policy.size import (
    ASSUMED,
    ModelSize,
    assumption,
    model_size,
    nfe_per_velocity,
    published,
    read_size,
)
from g2rpo.training.memory import encoding_bytes

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
FLUX = {
    "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 3,
    "joint_attention_dim": 40, "pooled_projection_dim": 20, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
SD3 = {
    "sample_size": 16, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 3,
    "joint_attention_dim": 40, "caption_projection_dim": 24, "pooled_projection_dim": 20,
    "pos_embed_max_size": 16,
}  # fmt: skip
SD35 = SD3 | {"dual_attention_layers": (0, 2), "qk_norm": "rms_norm"}
SD3_MEDIUM = {
    "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}  # fmt: skip
SD35_LARGE = {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
    "pos_embed_max_size": 192, "qk_norm": "rms_norm",
}  # fmt: skip


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def made(settings: dict[str, Any]) -> tuple[Any, ModelSize]:
    """The module of ``settings`` without data, and its size."""
    of_flux = "guidance_embeds" in settings or "num_single_layers" in settings or not settings
    kind, size = (FluxTransformer2DModel, FluxSize) if of_flux else (SD3Transformer2DModel, SD3Size)
    with torch.device("meta"):
        module = kind(**settings)
    return module, size.model_validate(dict(module.config))


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_embeds": True}, {}, FLUX, FLUX | {"num_layers": 0},
        SD3, SD35, published(SD35_MEDIUM).transformer, SD3_MEDIUM, SD35_LARGE,
    ],
    ids=str,
)  # fmt: skip
def test_sizes_are_those_of_the_real_module(settings: dict[str, Any]) -> None:
    module, size = made(settings)
    layers = {
        name: (layer.weight[0].numel(), layer.weight.shape[0])
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    assert {name: (layer.inputs, layer.outputs) for name, layer in size.layers.items()} == layers
    assert size.parameters == parameters(module)
    assert size.buffers == sum(b.numel() for _, b in module.named_buffers())
    blocks = {name: parameters(module.get_submodule(name)) for name in size.blocks}
    assert {name: block.parameters for name, block in size.blocks.items()} == blocks
    assert size.largest_block == max(blocks.values())
    lists = (
        getattr(module, name, ()) for name in ("transformer_blocks", "single_transformer_blocks")
    )
    assert len(blocks) == sum(map(len, lists))


def test_published_models_have_their_published_sizes() -> None:
    def size(settings: dict[str, Any]) -> int:
        return SD3Size.model_validate(settings).parameters

    assert size(published(SD35_MEDIUM).transformer) == 2_243_171_520
    assert size(SD3_MEDIUM) == 2_028_328_000
    assert size(SD35_LARGE) == 8_056_627_520
    assert FluxSize.model_validate(published(ASSUMED).transformer).parameters == 11_901_408_320


@pytest.mark.parametrize("settings", [FLUX | {"guidance_embeds": True}, SD3, SD35], ids=str)
def test_operations_are_those_that_torch_counts(settings: dict[str, Any]) -> None:
    module, size = made(settings)
    policy = PolicyConfig(source="here", resolution=96, max_sequence_length=11)
    rows, states = size.rows(policy), 2
    text = torch.empty(states, rows["text"], size.joint_attention_dim, device="meta")
    common = {
        "encoder_hidden_states": text,
        "pooled_projections": torch.empty(states, size.pooled_projection_dim, device="meta"),
        "timestep": torch.empty(states, device="meta"),
    }
    if isinstance(size, SD3Size):
        inputs = {"hidden_states": torch.empty(states, 16, 12, 12, device="meta")}
    else:
        inputs = {
            "hidden_states": torch.empty(states, rows["image"], 64, device="meta"),
            "img_ids": torch.empty(rows["image"], 3, device="meta"),
            "txt_ids": torch.empty(rows["text"], 3, device="meta"),
            "guidance": torch.empty(states, device="meta"),
        }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs, **common)
    assert counter.get_total_flops() == states * size.operations(policy)


@pytest.mark.parametrize(
    "targets", [None, ("attn.to_q", "proj_out"), ("x_embedder", "attn2.to_k"), ("proj",)]
)
@pytest.mark.parametrize("settings", [FLUX, SD35], ids=["flux", "sd35"])
def test_adapters_are_those_that_peft_makes(
    settings: dict[str, Any], targets: tuple[str, ...] | None
) -> None:
    config = LoraConfig(rank=3, **({} if targets is None else {"target_modules": targets}))
    module = (FluxTransformer2DModel if settings is FLUX else SD3Transformer2DModel)(**settings)
    _, size = made(settings)
    add_lora(module, config, 0)
    assert size.lora_parameters(config) == sum(p.numel() for p in lora_parameters(module).values())


def test_flux_dev_is_known_before_it_is_fetched() -> None:
    policy = PolicyConfig(source=ASSUMED, resolution=720, dtype="bfloat16")
    size = model_size(policy)
    assert size.lora_parameters(LoraConfig()) == 358_612_992
    assert size.tokens(policy) == 2025 + 512
    assert size.operations(policy) == pytest.approx(37.3e12, rel=2e-3)
    assert size.embedding_bytes(policy) == 2 * (512 * 4096 + 768)
    assert nfe_per_velocity(policy) == 1 and assumption(policy) is None


def test_sd35_medium_is_known_before_it_is_fetched() -> None:
    policy = PolicyConfig(
        source=SD35_MEDIUM, resolution=512, guidance_scale=4.5, max_sequence_length=256,
        dtype="bfloat16",
    )  # fmt: skip
    size = model_size(policy)
    assert size.tokens(policy) == 1024 + 77 + 256
    assert size.embedding_bytes(policy) == 2 * ((77 + 256) * 4096 + 2048)
    assert nfe_per_velocity(policy) == 2 and assumption(policy) is None
    assert nfe_per_velocity(policy.model_copy(update={"guidance_scale": 1.0})) == 1


def test_an_unknown_policy_is_planned_as_flux_dev_and_said_to_be() -> None:
    unknown = PolicyConfig(source="nobody/nothing", resolution=720)
    assert model_size(unknown) == model_size(unknown.model_copy(update={"source": ASSUMED}))
    assert nfe_per_velocity(unknown) == 1
    assert "nobody/nothing is neither on this machine nor in" in str(assumption(unknown))


def test_an_unknown_policy_of_a_pipeline_is_planned_as_the_catalogue_s_policy_of_it() -> None:
    unknown = PolicyConfig(
        source="nobody/nothing", pipeline="StableDiffusion3Pipeline", resolution=512
    )
    known = unknown.model_copy(update={"source": SD35_MEDIUM})
    assert model_size(unknown) == model_size(known)
    assert nfe_per_velocity(unknown) == nfe_per_velocity(known) == 2
    assert f"planned as {SD35_MEDIUM}" in str(assumption(unknown))


def test_the_catalogue_knows_the_architecture_of_every_policy() -> None:
    clip_g = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    with torch.device("meta"):
        clip_l = CLIPTextConfig(hidden_size=768, intermediate_size=3072, projection_dim=768)
        clip = CLIPTextModel(clip_l)
        clips = [
            CLIPTextModelWithProjection(config)
            for config in (clip_l, CLIPTextConfig(**clip_g, projection_dim=1280))
        ]
        t5 = T5EncoderModel(
            T5Config(
                d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
    encoders = {"FluxPipeline": [clip, t5], "StableDiffusion3Pipeline": [*clips, t5]}
    for artifact in catalogue().select([], ["policy"]):
        architecture = artifact.architecture
        assert architecture is not None
        size = model_size(PolicyConfig(source=artifact.repo, resolution=512))
        assert architecture.transformer.keys() <= type(size).model_fields.keys()
        models = encoders[architecture.pipeline]
        assert architecture.text_encoder_parameters == sum(map(parameters, models))
        policy = PolicyConfig(source=artifact.repo, resolution=512, dtype="bfloat16")
        assert encoding_bytes(policy) == 2 * architecture.text_encoder_parameters


def test_a_folder_is_read_and_refused_where_it_is_damaged(
    smoke_assets: Path, tmp_path: Path
) -> None:
    for folder in (smoke_assets / "policy", build_tiny_sd3(tmp_path / "sd3")):
        config = PolicyConfig(source=str(folder), height=32, width=48, max_sequence_length=24)
        policy = load_policy(config, "cpu")
        size = model_size(config)
        assert size == policy.model_size
        assert size.parameters == parameters(policy.transformer)
        assert size.rows(config)["image"] == policy.image_tokens
        assert size.rows(config)["text"] == policy.encode(["a circle"]).prompt_embeds.shape[1]
        assert assumption(config) is None
        encoders = policy_class(folder).text_encoders_class(
            folder, torch.float32, policy.device, 24
        )
        stored = 4 * sum(map(parameters, encoders.models))
        assert stored < encoding_bytes(config) < 1.2 * stored  # the files have headers
    (tmp_path / "sd3" / "vae" / "config.json").write_text("{}")
    read_size.cache_clear()
    with pytest.raises(UserError, match="are not those of a StableDiffusion3Pipeline") as caught:
        read_size(tmp_path / "sd3")
    assert "\n" not in str(caught.value)
