"""The arithmetic of memory, on numbers worked out by hand and on those measured on one GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from engine_runs import config_for

from g2rpo.errors import UserError
from g2rpo.policy import FluxPolicy, LoraConfig
from g2rpo.policy.lora import lora_parameters
from g2rpo.training.config import TrainConfig
from g2rpo.training.memory import (
    GIB,
    WORKING_BYTES,
    Sizes,
    alternatives,
    check_fits,
    estimate,
    transformer_sizes,
    weights_bytes,
)
from reproduce.experiment import Hardware, expand, load_experiment, load_profile
from reproduce.jobs.runner import check_memory

FLUX_TOKENS = 2025 + 512


@pytest.fixture(scope="module")
def flux() -> Sizes:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    linears = [
        (name, module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    return Sizes(11_901_408_320, 353_987_072, 57, 3072, FLUX_TOKENS, tuple(linears))


def config(assets: Path, **changes: Any) -> TrainConfig:
    execution = {"training_micro_batch": 1} | changes.pop("execution", {})
    policy = {"dtype": "bfloat16"}
    return config_for(assets, policy=policy, execution=execution, **changes)


def test_stored_parameters_are_counted_byte_by_byte(smoke_assets: Path) -> None:
    sizes = Sizes(1000, 100, 2, 8, 4, (("a.attn.to_q", 8, 8), ("a.proj_out", 8, 8)))
    whole = estimate(config(smoke_assets), sizes, 1)
    assert whole["weights"] == 2000 + 4000  # bfloat16 and the masters
    assert whole["gradients"] == 4000
    assert whole["optimiser states"] == 8000
    assert whole["activations"] == 2 * 18 * 4 * 8 * 2
    settings = {"optimizer": "adamw_8bit", "ema_decay": 0.9, "kl_coefficient": 0.1}
    more = estimate(config(smoke_assets, optimization=settings), sizes, 1)
    assert more["optimiser states"] == 2000
    assert more["average of the weights"] == 4000
    assert more["frozen base"] == 2000

    execution = {"sharding": "fsdp2", "rollout_weights": "gathered", "gradient_checkpointing": True}
    sharded = estimate(config(smoke_assets, execution=execution), sizes, 4)
    assert sharded["weights"] == sharded["gradients"] == 1000
    assert sharded["optimiser states"] == 2000
    assert sharded["gathered blocks"] == 600
    assert sharded["activations"] == (2 + 18) * 4 * 8 * 2
    assert sharded["gathered for rollouts"] == max(0, 2000 - 600 - sharded["activations"])

    lora = estimate(config(smoke_assets, lora={"rank": 2}), sizes, 1)
    assert lora["weights"] == 2000 + 32 * (2 + 4)
    assert lora["gradients"] == 32 * 4
    assert lora["optimiser states"] == 32 * 8


def test_the_adapters_are_those_that_peft_makes(smoke_assets: Path) -> None:
    tiny = config(smoke_assets, lora={"rank": 3})
    policy = FluxPolicy.load(tiny.policy, "cpu")
    sizes = transformer_sizes(tiny)
    assert sizes.parameters == sum(p.numel() for p in policy.transformer.parameters())
    assert sizes.tokens == policy.image_tokens + 20
    assert tiny.lora is not None
    policy.add_lora(tiny.lora)
    made = sum(p.numel() for p in lora_parameters(policy.transformer).values())
    assert sizes.adapters(tiny.lora) == made


def test_lora_agrees_with_what_was_measured_on_one_gpu(smoke_assets: Path, flux: Sizes) -> None:
    # Forward and backward at 720x720, without an optimiser: 24.6 GiB with gradient checkpointing
    # and 34.0 GiB without.
    for checkpointed, measured in ((True, 24.6), (False, 34.0)):
        execution = {"gradient_checkpointing": checkpointed}
        parts = estimate(config(smoke_assets, lora={}, execution=execution), flux, 1)
        computed = 2 * (flux.parameters + flux.adapters(LoraConfig()))
        assert (computed + parts["activations"]) / GIB == pytest.approx(measured, rel=0.04)


def test_the_profiles_fit_their_gpus(smoke_assets: Path, flux: Sizes) -> None:
    def need(ranks: int, **changes: Any) -> float:
        return sum(estimate(config(smoke_assets, **changes), flux, ranks).values()) / GIB

    sharded = {"sharding": "fsdp2", "rollout_weights": "gathered"}
    assert need(16, execution=sharded) < need(8, execution=sharded) < 70
    assert need(1, lora={}) < 70
    assert need(1, lora={}, execution={"gradient_checkpointing": True}) < 36
    assert need(1) > 200
    assert need(1, lora={}) * GIB > WORKING_BYTES


def test_what_does_not_fit_is_refused_before_it_is_submitted(
    smoke_assets: Path, flux: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TrainConfig] = []

    def sizes(config: TrainConfig) -> Sizes:
        asked.append(config)
        return flux

    monkeypatch.setattr("g2rpo.training.memory.transformer_sizes", sizes)
    profile = load_profile("smoke").model_copy(
        update={
            "policy": config(smoke_assets).policy,
            "hardware": Hardware(gpus=1, gpu_memory_gb=80),
        }
    )
    cells = expand(load_experiment("table1"), profile, (1, 2), {})
    with pytest.raises(UserError) as caught:
        check_memory(profile, cells)
    assert str(caught.value).startswith("hps/")
    assert "profile smoke: this run needs about" in str(caught.value)
    assert "has 80.0 GiB" in str(caught.value)
    asked.clear()
    adapters = expand(
        load_experiment("table1"),
        profile,
        (1, 2),
        {"lora": {}, "execution": {"training_micro_batch": 1}},
    )
    check_memory(profile, adapters)
    assert 0 < len(asked) < len(adapters) / 2  # the same training at two seeds is asked once
    absent = profile.model_copy(
        update={"policy": profile.policy.model_copy(update={"source": "nobody/nothing"})}
    )
    check_memory(absent, expand(load_experiment("table1"), absent, (1,), {}))
    without = profile.model_copy(update={"hardware": Hardware()})
    check_memory(without, cells)


def test_what_does_not_fit_is_told_with_what_would(
    smoke_assets: Path, flux: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("g2rpo.training.memory.transformer_sizes", lambda _: flux)
    with pytest.raises(UserError) as caught:
        check_fits(config(smoke_assets), 1, 79 * GIB)
    message = str(caught.value)
    assert "\n" not in message
    assert "optimiser states 88.7" in message
    assert "execution.sharding=fsdp2 on 4 GPUs" in message
    assert "fsdp2 on 2 GPUs" not in message
    assert "lora={}" in message

    large = config(smoke_assets, lora={}, execution={"training_micro_batch": 16})
    with pytest.raises(UserError, match=r"what would fit: execution.training_micro_batch=1"):
        check_fits(large, 1, 79 * GIB)
    rewards = config(smoke_assets, lora={})
    assert check_fits(rewards, 1, 79 * GIB, 10 * GIB)["reward models"] == 10 * GIB
    with pytest.raises(UserError, match=r"execution\.offload\.rewards=true"):
        check_fits(rewards, 1, 50 * GIB, 10 * GIB)
    with pytest.raises(UserError, match="GPUs with more memory"):
        check_fits(rewards, 1, 10 * GIB)
    assert alternatives(rewards, flux, 1, 10 * GIB) == []


def test_weight_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    (tmp_path / "b.txt").write_bytes(b"123")
    assert weights_bytes(tmp_path) == 5
    assert weights_bytes(tmp_path / "b.txt") == 3
    assert weights_bytes(tmp_path / "absent") == 0
