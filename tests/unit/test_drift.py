"""Drift against a plain float64 loop; 0 for the base; growing with the distance moved."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.evaluation.drift import (
    DriftConfig,
    DriftReference,
    base_reference,
    measure_drift,
    no_drift,
)
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.errors import UserError
from g2rpo.flow.schedule import GridConfig, SigmaGrid, build_grid
from g2rpo.policy import Policy, PolicyConfig, load_policy
from g2rpo.sampling import evaluation_noise
from g2rpo.seeds import gaussian

SEED = 11
DRIFT = DriftConfig(prompts=3, sigmas=(1.0, 0.6, 0.2))


def policy_of(assets: Path, dtype: str = "float32") -> Policy:
    config = {"source": str(assets / "policy"), "resolution": 32, "max_sequence_length": 16}
    return load_policy(PolicyConfig.model_validate(config | {"dtype": dtype}), "cpu")


@pytest.fixture(scope="module")
def prompts(smoke_assets: Path) -> list[Prompt]:
    return read_prompts(smoke_assets / "prompts" / "test.txt", 5)


@pytest.fixture(scope="module")
def base(smoke_assets: Path) -> Policy:
    return policy_of(smoke_assets)


@pytest.fixture(scope="module")
def grid(base: Policy) -> SigmaGrid:
    return build_grid(GridConfig(steps=3, timestep="exact"), base.image_tokens)


@pytest.fixture(scope="module")
def reference(base: Policy, prompts: list[Prompt], grid: SigmaGrid) -> DriftReference:
    return base_reference(base, prompts, DRIFT, grid, SEED, batch=2)


def perturb(policy: Policy, scale: float) -> Policy:
    """The last layer moved: velocities are linear in it, so the drift is quadratic."""
    draws = torch.Generator().manual_seed(1)
    parameters = dict(policy.transformer.named_parameters())
    weight = parameters["proj_out.weight"]
    change = torch.randn(weight.shape, generator=draws).to(weight.dtype)
    with torch.no_grad():
        weight.add_(scale * weight.std() * change)
    return policy


def values(policy: Policy, prompts: list[Prompt], reference: DriftReference) -> np.ndarray:
    frame = measure_drift(policy, prompts, DRIFT, reference, batch=2)
    assert list(frame["prompt_id"]) == [prompt.id for prompt in prompts[:3]]
    return frame["value"].to_numpy()


@torch.no_grad()
def plain_drift(one: Policy, two: Policy, prompt: Prompt, grid: SigmaGrid) -> float:
    """The definition, one state and one number at a time, in float64."""
    conditioning = one.encode([prompt.text])

    def velocity(policy: Policy, x: torch.Tensor, time: float) -> torch.Tensor:
        return policy.velocity(x[None], torch.tensor([time], dtype=x.dtype), conditioning)[0]

    x = evaluation_noise(one, SEED, prompt).double()
    for now, after, time in zip(grid.sigmas, grid.sigmas[1:], grid.timesteps, strict=False):
        x = x + (after - now) * velocity(one, x, time)
    total, count = 0.0, 0
    for index, sigma in enumerate(DRIFT.sigmas):
        drawn = gaussian(one.latent_shape, SEED, "drift-noise", prompt.id, index)
        noisy = (1 - sigma) * x + sigma * one.pack(drawn[None])[0].double()
        first, second = (velocity(policy, noisy, sigma) for policy in (one, two))
        for a, b in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True):
            total += (a - b) ** 2
            count += 1
    return total / count


def test_drift_is_that_of_a_plain_float64_loop(
    smoke_assets: Path, prompts: list[Prompt], grid: SigmaGrid, reference: DriftReference
) -> None:
    found = values(perturb(policy_of(smoke_assets), 0.1), prompts, reference)
    exact = policy_of(smoke_assets, "float64")
    moved = perturb(policy_of(smoke_assets, "float64"), 0.1)
    expected = [plain_drift(exact, moved, prompt, grid) for prompt in prompts[:3]]
    assert min(expected) > 1e-4
    assert found == pytest.approx(expected, rel=1e-3)


def test_the_base_has_not_drifted_at_all(
    smoke_assets: Path, base: Policy, prompts: list[Prompt], reference: DriftReference
) -> None:
    assert (values(base, prompts, reference) == 0).all()
    assert (values(policy_of(smoke_assets), prompts, reference) == 0).all()
    measured = measure_drift(base, prompts, DRIFT, reference, batch=2)
    assert no_drift(prompts, DRIFT).equals(measured)


def test_inputs_depend_on_seed_prompt_and_sigma_alone(
    base: Policy, prompts: list[Prompt], grid: SigmaGrid, reference: DriftReference
) -> None:
    assert reference.latents.shape == (3, 3, base.image_tokens, 64)
    other = base_reference(base, prompts[::-1], DriftConfig(prompts=5, sigmas=(1.0,)), grid, SEED)
    for place, prompt in enumerate(prompts[:3]):
        # At sigma = 1 the input is the draw itself.
        drawn = base.pack(gaussian(base.latent_shape, SEED, "drift-noise", prompt.id, 0)[None])[0]
        assert torch.equal(reference.latents[place, 0], drawn)
        assert torch.equal(other.latents[4 - place, 0], drawn)


def test_the_reference_is_kept_whole_or_refused(reference: DriftReference, tmp_path: Path) -> None:
    path = tmp_path / "base" / "reference.safetensors"
    reference.save(path)
    found = DriftReference.load(path)
    assert torch.equal(found.latents, reference.latents)
    assert torch.equal(found.velocities, reference.velocities)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="recomputing it"):
        DriftReference.load(path)


@pytest.mark.parametrize("sigma", [0.0, 1.5, math.nan])
def test_impossible_sigmas_are_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigmas"):
        DriftConfig(prompts=2, sigmas=(sigma,))
