"""Sampling along a grid against a plain loop in float64, with one and with two sets of weights."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.evaluation.protocol import EvaluationConfig
from g2rpo.config import validate
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.errors import UserError
from g2rpo.flow.schedule import GridConfig, SigmaGrid, build_grid
from g2rpo.policy import Policy, PolicyConfig, load_policy
from g2rpo.policy.base import HybridSampling
from g2rpo.policy.config import HybridConfig
from g2rpo.sampling import evaluation_noise, sample_latents, sample_ode

SEED = 11
STEPS = 5


@pytest.fixture(scope="module")
def prompts(smoke_assets: Path) -> list[Prompt]:
    return read_prompts(smoke_assets / "prompts" / "test.txt", 5)


@pytest.fixture(scope="module")
def base(smoke_assets: Path) -> Policy:
    return load(smoke_assets, "float32")


@pytest.fixture(scope="module")
def tuned(base: Policy) -> Policy:
    return moved(base)


def load(assets: Path, dtype: str) -> Policy:
    config = PolicyConfig.model_validate(
        {
            "source": str(assets / "policy"),
            "resolution": 32,
            "max_sequence_length": 24,
            "dtype": dtype,
        }
    )
    return load_policy(config, "cpu")


def moved(base: Policy) -> Policy:
    """The same architecture with clearly different weights."""
    policy = base.with_base_transformer()
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.transformer.parameters():
            noise = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
            parameter.add_((0.2 * parameter.std() * noise).to(parameter.dtype))
    return policy


def hybrid(tuned: Policy, base: Policy, steps: int) -> Policy:
    policy = copy.copy(tuned)
    policy.handover = HybridSampling(base, steps)
    return policy


@torch.no_grad()
def plain_loop(policies: list[Policy], prompts: list[Prompt], grid: SigmaGrid) -> Tensor:
    """One prompt at a time, one policy for each step, everything in float64."""
    results = []
    for prompt in prompts:
        x = evaluation_noise(policies[0], SEED, prompt).double()[None]
        text = policies[0].encode([prompt.text])
        for step, policy in enumerate(policies):
            time = torch.tensor([grid.timesteps[step]], dtype=torch.float64)
            v = policy.velocity(x, time, text).double()
            x = x + v * (grid.sigmas[step + 1] - grid.sigmas[step])
        results.append(x[0])
    return torch.stack(results)


@pytest.mark.parametrize(
    ("after", "timestep"), [(0, "exact"), (1, "truncated"), (3, "exact"), (STEPS, "truncated")]
)
def test_hybrid_sampling_equals_a_plain_float64_loop(
    smoke_assets: Path, prompts: list[Prompt], after: int, timestep: str
) -> None:
    base = load(smoke_assets, "float64")
    tuned = moved(base)
    grid = build_grid(
        GridConfig.model_validate({"steps": STEPS, "timestep": timestep}), base.image_tokens
    )
    found = sample_latents(hybrid(tuned, base, after), prompts, grid, SEED, batch=2)
    expected = plain_loop([tuned] * after + [base] * (STEPS - after), prompts, grid)
    # The latents are stored in float32 between the steps.
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    if 0 < after < STEPS:
        others = [[tuned] * STEPS, [base] * STEPS, [base] * after + [tuned] * (STEPS - after)]
        for other in others:
            distance = (plain_loop(other, prompts, grid) - expected).abs().max()
            assert distance > 1e-2


@pytest.mark.parametrize("batch", [2, 64])
def test_all_tuned_is_plain_and_none_tuned_is_the_base_bit_for_bit(
    base: Policy, tuned: Policy, prompts: list[Prompt], batch: int
) -> None:
    grid = build_grid(GridConfig(steps=STEPS), base.image_tokens)

    def latents(policy: Policy) -> Tensor:
        return sample_latents(policy, prompts, grid, SEED, batch)

    plain, untouched = latents(tuned), latents(base)
    assert not torch.equal(plain, untouched)
    assert torch.equal(latents(hybrid(tuned, base, STEPS)), plain)
    assert torch.equal(latents(hybrid(tuned, base, 0)), untouched)
    # A handover from a policy to itself: the two walks meet in the same floating-point numbers.
    for after in range(STEPS + 1):
        again = base.with_base_transformer()
        assert torch.equal(latents(hybrid(again, base, after)), untouched)
    assert torch.equal(latents(tuned), plain)


def test_hybrid_images_are_those_of_the_latents(
    base: Policy, tuned: Policy, prompts: list[Prompt]
) -> None:
    grid = build_grid(GridConfig(steps=STEPS), base.image_tokens)
    policy = hybrid(tuned, base, 3)
    images = sample_ode(policy, prompts, grid, SEED)
    assert torch.equal(images, base.decode(sample_latents(policy, prompts, grid, SEED)))
    assert not torch.equal(images, sample_ode(tuned, prompts, grid, SEED))
    assert not torch.equal(images, sample_ode(base, prompts, grid, SEED))


def test_stretches_of_a_grid_meet(base: Policy) -> None:
    grid = build_grid(GridConfig(steps=50, schedule="flux_dynamic"), base.image_tokens)
    first, second = grid.stretch(0, 30), grid.stretch(30, 50)
    assert (first.steps, second.steps) == (30, 20)
    assert first.sigmas + second.sigmas[1:] == grid.sigmas
    assert first.timesteps[:-1] + second.timesteps == grid.timesteps


def evaluation(**changes: object) -> EvaluationConfig:
    return validate(EvaluationConfig, {"name": "e", **changes}, "evaluation")


def test_the_handover_is_checked_against_the_grid() -> None:
    assert HybridConfig(tuned_fraction=0.6).steps_of(50) == 30
    assert HybridConfig(tuned_steps=30).steps_of(50) == 30
    assert HybridConfig(tuned_fraction=1.0).steps_of(50) == 50
    with pytest.raises(UserError, match="51 exceeds the grid's 50 steps"):
        evaluation(hybrid={"tuned_steps": 51})
    with pytest.raises(UserError, match="either tuned_steps or tuned_fraction"):
        evaluation(hybrid={})
    with pytest.raises(UserError, match="either tuned_steps or tuned_fraction"):
        evaluation(hybrid={"tuned_steps": 1, "tuned_fraction": 0.5})
