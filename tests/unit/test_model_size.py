"""The size of a policy, counted from its configuration, against the modules that it stands for."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from g2rpo.errors import UserError
from g2rpo.policy import LoraConfig, PolicyConfig, load_policy
from g2rpo.policy.lora import add_lora, lora_parameters
from g2rpo.policy.size import FLUX_DEV, ModelSize, model_size, read_size

SMALL = {
    "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 3,
    "joint_attention_dim": 40, "pooled_projection_dim": 20,
}  # fmt: skip


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    "settings", [{"guidance_embeds": True}, {}, SMALL, SMALL | {"num_layers": 0}], ids=str
)
def test_sizes_are_those_of_the_real_module(settings: dict[str, int]) -> None:
    with torch.device("meta"):
        axes = {"axes_dims_rope": (2, 2, 4)} if "num_layers" in settings else {}
        model = FluxTransformer2DModel(**settings, **axes)
    size = ModelSize.model_validate(dict(model.config))
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    assert size.linears == {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    assert size.parameters == parameters(model)
    assert size.largest_block == max(map(parameters, blocks))
    assert size.blocks == len(blocks)


@pytest.mark.parametrize("targets", [None, ("attn.to_q", "proj_out"), ("x_embedder",)])
def test_adapters_are_those_that_peft_makes(targets: tuple[str, ...] | None) -> None:
    config = LoraConfig(rank=3, **({} if targets is None else {"target_modules": targets}))
    model = FluxTransformer2DModel(**SMALL, axes_dims_rope=(2, 2, 4))
    add_lora(model, config, 0)
    made = sum(p.numel() for p in lora_parameters(model).values())
    assert ModelSize.model_validate(SMALL).lora_parameters(config) == made


def test_flux_dev_has_its_published_size() -> None:
    policy = PolicyConfig(source="black-forest-labs/FLUX.1-dev", resolution=720)
    size = model_size(policy)
    assert size == FLUX_DEV
    assert size.parameters == 11_901_408_320
    assert size.lora_parameters(LoraConfig()) == 358_612_992
    assert size.tokens(policy) == 2025 + 512
    assert size.operations(policy) == pytest.approx(37.3e12, rel=2e-3)
    half = policy.model_copy(update={"dtype": "bfloat16"})
    assert size.embedding_bytes(half) == 2 * (512 * 4096 + 768)


def test_a_folder_is_read_and_refused_where_it_is_damaged(
    smoke_assets: Path, tmp_path: Path
) -> None:
    config = PolicyConfig(source=str(smoke_assets / "policy"), height=32, width=48)
    policy = load_policy(config, "cpu")
    size = model_size(config)
    assert size.parameters == parameters(policy.transformer)
    assert size.tokens(config) == policy.image_tokens + config.max_sequence_length
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    with pytest.raises(UserError, match="are not those of FLUX") as caught:
        read_size(tmp_path)
    assert "\n" not in str(caught.value)
