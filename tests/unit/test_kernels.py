"""Attention backends and compilation: the same numbers, in rollout and training alike."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from engine_runs import config_for, trainer_for
from torch import Tensor, nn

from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import RolloutTree
from g2rpo.flow.transition import Transition, log_prob, per_state, transition_mean
from g2rpo.policy import Policy, PolicyConfig, load_policy
from g2rpo.policy.cpu_blocks import use_diffusers_blocks
from g2rpo.policy.kernels import (
    Attention,
    is_compiled,
    resolve_attention,
    set_attention,
)
from g2rpo.training.continuation import ContinuationConfig, ContinuationPolicy

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _same_backend_afterwards() -> Iterator[None]:
    active = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(active)


@pytest.fixture
def policy(flux_folder: Path) -> Policy:
    config = PolicyConfig(source=str(flux_folder), resolution=32, max_sequence_length=24)
    return load_policy(config, "cpu")


def velocity_of(policy: Policy, batch: int = 3) -> Tensor:
    conditioning = policy.encode(["a red circle"]).select([0] * batch)
    generator = torch.Generator().manual_seed(1)
    latents = policy.pack(torch.randn(batch, *policy.latent_shape, generator=generator))
    return policy.velocity(latents, torch.linspace(0.2, 0.9, batch), conditioning)


@pytest.mark.parametrize(
    ("choice", "device", "dtype", "expected"),
    [
        ("auto", CPU, torch.float32, "native"),
        ("auto", GPU, torch.bfloat16, "flash"),
        ("auto", GPU, torch.float32, "efficient"),
        ("auto", GPU, torch.float64, "math"),
        ("cudnn", GPU, torch.bfloat16, "cudnn"),
        ("math", CPU, torch.bfloat16, "math"),
    ],
)
def test_auto_is_a_kernel_that_has_a_backward_there(
    choice: Attention, device: torch.device, dtype: torch.dtype, expected: str
) -> None:
    assert resolve_attention(choice, device, dtype) == expected


@pytest.mark.parametrize(
    ("choice", "device", "dtype"),
    [
        ("cudnn", CPU, torch.bfloat16),
        ("efficient", CPU, torch.float32),
        ("flash", GPU, torch.float32),
        ("cudnn", GPU, torch.float64),
    ],
)
def test_what_cannot_run_is_refused(
    choice: Attention, device: torch.device, dtype: torch.dtype
) -> None:
    with pytest.raises(UserError, match=r"execution.attention: .*use auto"):
        resolve_attention(choice, device, dtype)


@pytest.mark.parametrize("choice", ["native", "flash", "math"])
def test_every_backend_gives_the_same_velocity_and_gradient(
    policy: Policy, choice: Attention
) -> None:
    found = []
    for chosen in ("native", choice):
        set_attention(policy.transformer, chosen)
        policy.transformer.zero_grad()
        velocity = velocity_of(policy)
        velocity.square().mean().backward()
        gradient = policy.transformer.x_embedder.weight.grad  # type: ignore[union-attr]
        assert isinstance(gradient, Tensor)
        found.append((velocity.detach(), gradient.clone()))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
    names = {
        module.processor._attention_backend
        for module in policy.transformer.modules()
        if hasattr(module, "processor")
    }
    wanted = {"native": "native", "flash": "_native_flash", "math": "_native_math"}[choice]
    assert names == {AttentionBackendName(wanted)}


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are traced as for compilation, but run as they are: no C++ is compiled."""
    compile_module = nn.Module.compile

    def traced(module: nn.Module, **options: Any) -> None:
        compile_module(module, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", traced)


def test_compiled_blocks_give_training_the_velocity_of_the_rollout(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients and with them the graphs are others; the ratio must stay 1."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of workers
    # Vector types come with headers that the compiler takes 15 to 20 s to precompile.
    monkeypatch.setattr("torch._inductor.config.cpp.simdlen", 1)
    expected = velocity_of(policy, 2).detach()
    use_diffusers_blocks(policy.transformer)  # as compile_blocks
    # One block alone: a C++ compiler takes a minute for both kinds.
    policy.transformer.get_submodule("single_transformer_blocks.0").compile(fullgraph=True)
    with torch.no_grad():
        rollout = velocity_of(policy, 2)
    training = velocity_of(policy, 2)
    torch.testing.assert_close(rollout, expected, rtol=1e-4, atol=1e-4)
    law = Transition(0.9, 0.8, diffusion=0.7)
    latents, noise = torch.randn_like(expected), torch.randn_like(expected)
    std = per_state([law.std] * 2, latents)
    moved = transition_mean(latents, rollout, [law] * 2) + std * noise
    before, after = (
        log_prob(moved, transition_mean(latents, v.detach(), [law] * 2), std)
        for v in (rollout, training)
    )
    assert float((torch.exp(after - before) - 1).abs().max()) < 2e-5


@pytest.mark.usefixtures("traced_only")
def test_a_compiled_run_trains_as_a_plain_one(smoke_assets: Path, tmp_path: Path) -> None:
    """Whole blocks can be traced, for batches of several sizes, with and without gradients."""
    execution = {"compile": True, "rollout_micro_batch": 5, "training_micro_batch": 2}
    method = {"name": "g2rpo", "granularities": [1], "stochastic_steps": [0, 1]}
    rollout = {"prompts_per_iteration": 3}
    config = config_for(smoke_assets, execution=execution, method=method, rollout=rollout)
    trainer = trainer_for(config, tmp_path / "compiled")
    compiled = [m for m in trainer.policy.transformer.modules() if is_compiled(m)]
    assert compiled
    row = trainer.iterate()
    assert row["ratio_deviation"] < 2e-5
    plain = config_for(smoke_assets, method=method, rollout=rollout)
    expected = trainer_for(plain, tmp_path / "plain").iterate()
    assert row["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-2)

    # The approximate twin of a compiled policy computes with its own layers.
    twin = ContinuationPolicy(trainer.policy, ContinuationConfig(fp8=True))
    assert len([m for m in twin.policy.transformer.modules() if is_compiled(m)]) == len(compiled)
    conditioning = trainer.policy.encode(["a red circle", "a blue square"])
    latents = trainer.policy.pack(torch.randn(2, *trainer.policy.latent_shape))
    times, prompts = torch.tensor([0.5, 0.5]), torch.tensor([0, 1])
    with torch.no_grad(), twin.rollout(RolloutTree(4), conditioning) as continuations:
        approximate = continuations(latents, times, prompts, [(0, 0), (1, 0)])
        exact = trainer.policy.velocity(latents, times, conditioning)
    change = (approximate - exact).norm() / exact.norm()
    assert 1e-4 < float(change) < 0.2
