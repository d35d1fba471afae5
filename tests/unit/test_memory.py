"""The arithmetic of memory, on numbers worked out by hand and on those measured on one GPU."""

from pathlib import Path
from typing import Any

import pytest
from engine_runs import config_for

from g2rpo.errors import UserError
from g2rpo.policy.config import LoraConfig
from g2rpo.policy.flux_size import FluxSize
from g2rpo.training.config import TrainConfig
from g2rpo.training.memory import (
    GIB,
    STATE_UNITS,
    WORKING_BYTES,
    check_fits,
    gpu_bytes,
    weights_bytes,
)
from reproduce.experiment import Hardware, expand, load_experiment, load_profile
from reproduce.jobs import runner

FLUX_DEV = FluxSize(guidance_embeds=True)
SMALL = FluxSize(
    num_layers=1, num_single_layers=1, num_attention_heads=1, attention_head_dim=8,
    joint_attention_dim=40, pooled_projection_dim=20,
)  # fmt: skip


def config(assets: Path, **changes: Any) -> TrainConfig:
    execution = {"training_micro_batch": 1} | changes.pop("execution", {})
    policy = {"dtype": "bfloat16", "resolution": 720, "max_sequence_length": 512}
    return config_for(assets, policy=policy, execution=execution, **changes)


def test_stored_parameters_are_counted_byte_by_byte(smoke_assets: Path) -> None:
    n, tokens = SMALL.parameters, 2025 + 512
    whole = gpu_bytes(config(smoke_assets), SMALL, 1)
    assert whole["weights"] == 2 * n + 4 * n  # bfloat16 and the masters
    assert whole["gradients"] == 4 * n
    assert whole["optimiser states"] == 8 * n
    assert whole["activations"] == (22 + 19) * tokens * 8 * 2
    settings = {"optimizer": "adamw_8bit", "ema_decay": 0.9, "kl_coefficient": 0.1}
    more = gpu_bytes(config(smoke_assets, optimization=settings), SMALL, 1)
    assert more["optimiser states"] == 2 * n
    assert more["average of the weights"] == 4 * n
    assert more["frozen base"] == 2 * n

    execution = {
        "sharding": "fsdp2", "rollout_weights": "gathered", "gradient_checkpointing": True,
        "rollout_micro_batch": 2,
    }  # fmt: skip
    sharded = gpu_bytes(config(smoke_assets, execution=execution), SMALL, 4)
    assert sharded["weights"] == sharded["gradients"] == n
    assert sharded["optimiser states"] == 2 * n
    assert sharded["gathered blocks"] == (3 * 2 + 2 * 4) * SMALL.largest_block
    assert sharded["activations"] == (2 + 22) * tokens * 8 * 2
    rollout = 2 * STATE_UNITS * tokens * 8 * 2 + 2 * n
    beside = sum(sharded[part] for part in ("activations", "gathered blocks", "gradients"))
    assert sharded["extra for rollouts"] == rollout - beside > 0

    adapters = SMALL.lora_parameters(LoraConfig(rank=2))
    lora = gpu_bytes(config(smoke_assets, lora={"rank": 2}), SMALL, 1)
    assert lora["weights"] == 2 * n + (2 + 4) * adapters
    assert lora["gradients"] == 4 * adapters
    assert lora["optimiser states"] == 8 * adapters


def test_lora_agrees_with_what_was_measured_on_one_gpu(smoke_assets: Path) -> None:
    # Forward and backward at 720x720, without an optimiser: 24.6 GiB with gradient checkpointing
    # and 34.0 GiB without.
    for checkpointed, measured in ((True, 24.6), (False, 34.0)):
        execution = {"gradient_checkpointing": checkpointed}
        parts = gpu_bytes(config(smoke_assets, lora={}, execution=execution), FLUX_DEV, 1)
        computed = 2 * (FLUX_DEV.parameters + FLUX_DEV.lora_parameters(LoraConfig()))
        assert (computed + parts["activations"]) / GIB == pytest.approx(measured, rel=0.04)


def test_the_profiles_fit_their_gpus(smoke_assets: Path) -> None:
    def need(ranks: int, **changes: Any) -> float:
        return sum(gpu_bytes(config(smoke_assets, **changes), FLUX_DEV, ranks).values()) / GIB

    sharded = {"sharding": "fsdp2", "rollout_weights": "gathered"}
    assert need(16, execution=sharded) < need(8, execution=sharded) < 70
    assert need(1, lora={}) < 70
    assert need(1, lora={}, execution={"gradient_checkpointing": True}) < 36
    assert need(1) > 200
    assert need(1, lora={}) * GIB > WORKING_BYTES


def test_what_does_not_fit_is_refused_before_it_is_submitted(smoke_assets: Path) -> None:
    def check(source: str, memory: int, **overrides: Any) -> None:
        policy = config(smoke_assets).policy.model_copy(update={"source": source})
        hardware = Hardware(gpus=1, gpu_memory_gb=memory) if memory else Hardware()
        update = {"policy": policy, "hardware": hardware}
        profile = load_profile("smoke").model_copy(update=update)
        execution = {"training_micro_batch": 1}
        cells = expand(
            load_experiment("table1"), profile, (1, 2), {"execution": execution} | overrides
        )
        runner.check_memory(profile, cells)

    flux, sd35 = "black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-3.5-medium"
    with pytest.raises(UserError) as caught:
        check(flux, 80)
    assert str(caught.value).startswith("hps/")
    assert "profile smoke: this run needs about" in str(caught.value)
    assert "GPUs have 80.0 GiB" in str(caught.value)
    check(flux, 80, lora={})
    check(sd35, 80)
    check("nobody/nothing", 80)  # of unknown size
    check(flux, 0)
    with pytest.raises(
        UserError, match=r"encoders need about 10\.4 GiB of a GPU, but the GPUs have 8"
    ):
        check(sd35, 8, lora={})


def test_an_error_names_what_would_fit(smoke_assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        check_fits(config(smoke_assets), FLUX_DEV, 1, 79 * GIB)
    message = str(caught.value)
    assert "\n" not in message
    assert "optimiser states 88.7" in message
    assert "execution.sharding=fsdp2 on 4 GPUs" in message
    assert "fsdp2 on 2 GPUs" not in message
    assert "lora={}" in message

    large = config(smoke_assets, lora={}, execution={"training_micro_batch": 16})
    with pytest.raises(UserError, match=r"; use execution.training_micro_batch=1"):
        check_fits(large, FLUX_DEV, 1, 79 * GIB)
    monkeypatch.setattr("g2rpo.training.memory.weights_bytes", lambda _: 10 * GIB)
    rewards = config(
        smoke_assets,
        lora={},
        rewards={"hps": {"reward": {"model": "hps", "source": str(smoke_assets)}}},
    )
    assert check_fits(rewards, FLUX_DEV, 1, 79 * GIB)["reward models"] == 10 * GIB
    with pytest.raises(UserError, match=r"; use execution\.offload\.rewards=true"):
        check_fits(rewards, FLUX_DEV, 1, 50 * GIB)
    with pytest.raises(UserError, match="GPUs with more memory"):
        check_fits(rewards, FLUX_DEV, 1, 10 * GIB)


def test_published_rewards_count_as_in_the_catalogue(smoke_assets: Path) -> None:
    def bytes_of(**rewards: dict[str, str]) -> float:
        terms = {name: {"reward": reward} for name, reward in rewards.items()}
        changed = config(smoke_assets, lora={}, rewards=terms)
        return gpu_bytes(changed, FLUX_DEV, 1)["reward models"]

    assert bytes_of(hps={"model": "hps"}) == 1_972_000_000
    assert bytes_of(clip={"model": "clip", "variant": "378"}) == 3_947_000_000
    both = bytes_of(hps={"model": "hps"}, pick_score={"model": "pick_score"})
    assert both == 1_972_000_000 + 3_944_000_000


def test_weight_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    (tmp_path / "b.txt").write_bytes(b"123")
    assert weights_bytes(tmp_path) == 5
    assert weights_bytes(tmp_path / "b.txt") == 3
    assert weights_bytes(tmp_path / "absent") == 0
