"""The sigma grid: closed form, ends, and the released float32 truncation."""

import itertools
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from g2rpo.flow.schedule import (
    GridConfig,
    SigmaGrid,
    build_grid,
    flux_dynamic_sigmas,
    sd3_sigmas,
    shifted_sigmas,
    truncated_times,
)
from g2rpo.flow.transition import flow_diffusion

SHIFTS = (0.1, 0.2, 0.3, 0.45, 0.5, 1.0, 1.15, 2.0, 2.22, 3.0, 3.16, 5.0, 7.5, 12.0)


def released_times(steps: int, shift: float) -> list[float]:
    """linspace, shift and int(sigma * 1000) / 1000, each in float32 torch as the training loops."""
    schedule = torch.linspace(1, 0, steps + 1)
    schedule = (shift * schedule) / (1 + (shift - 1) * schedule)
    return [int(sigma * 1000) / 1000 for sigma in schedule]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [2, 3, 10, 16, 25, 50, 197])
def test_shifted_grid_is_the_closed_form(steps: int, shift: float) -> None:
    sigmas = shifted_sigmas(steps, shift)
    assert len(sigmas) == steps + 1
    for index, sigma in enumerate(sigmas):
        # s u / (1 + (s - 1) u) at u = (T - i) / T, cleared of its fractions.
        left = steps - index
        assert sigma == pytest.approx(shift * left / (index + shift * left), rel=1e-13, abs=0)


@given(steps=st.integers(2, 300), shift=st.floats(0.05, 50))
@settings(max_examples=200, deadline=None)
def test_ends_are_exact_and_the_grid_falls(steps: int, shift: float) -> None:
    sigmas = shifted_sigmas(steps, shift)
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert all(later < earlier for earlier, later in itertools.pairwise(sigmas))


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_first_diffusion_coefficient_is_finite_at_every_shift(shift: float) -> None:
    # sigma_0 beside 1 would put 1 / (1 - sigma_0) in it, or the root of a negative number.
    sigmas = shifted_sigmas(8, shift)
    expected = 0.7 / math.sqrt(1.0 - sigmas[1])
    assert flow_diffusion(0.7, sigmas)[0] == pytest.approx(expected, rel=1e-12)


def test_paper_grid_values() -> None:
    # T = 16, s = 3: the first steps leave sigma near 1, and strided tails start at high noise.
    sigmas = shifted_sigmas(16, 3.0)
    assert sigmas[1] == pytest.approx(45 / 46)
    assert sigmas[8] == pytest.approx(0.75)
    assert sigmas[15] == pytest.approx(1 / 6)


@pytest.mark.parametrize("shift", [1.0, 1.15, 2.0, 2.22, 3.0, 3.16, 5.0, 7.5])
def test_truncated_times_are_the_released_ones(shift: float) -> None:
    for steps in range(2, 201):  # at T = 7 a float64 grid falls on the other side of 0.8
        assert list(truncated_times(steps, shift)) == released_times(steps, shift), steps


@pytest.mark.parametrize("schedule", ["shifted", "flux_dynamic", "sd3"])
def test_build_grid_offers_exact_and_truncated_times(schedule: str) -> None:
    exact = build_grid(GridConfig(steps=16, schedule=schedule, timestep="exact"), 2025)
    truncated = build_grid(GridConfig(steps=16, schedule=schedule, timestep="truncated"), 2025)
    assert exact.sigmas == truncated.sigmas
    assert exact.timesteps == exact.sigmas
    assert exact.steps == truncated.steps == 16
    for sigma, time in zip(truncated.sigmas, truncated.timesteps, strict=True):
        assert time * 1000 == pytest.approx(round(time * 1000), abs=1e-9)
        assert -1e-6 <= sigma - time < 1e-3 + 1e-6
    assert truncated.timesteps != exact.timesteps


@pytest.mark.parametrize(
    ("tokens", "shift"),
    [(256, math.exp(0.5)), (2025, 2.22), (4096, math.exp(1.15)), (2176, math.exp(0.825))],
)
def test_flux_dynamic_grid(tokens: int, shift: float) -> None:
    sigmas = flux_dynamic_sigmas(10, tokens)
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    for index, sigma in enumerate(sigmas[:-1]):
        # e^mu / (e^mu + 1/u - 1) with u = 1, ..., 1/T (its last step is longer than the others).
        u = 1.0 + (0.1 - 1.0) * index / 9
        assert sigma == pytest.approx(shift / (shift + 1 / u - 1), rel=2e-3)
    assert SigmaGrid(sigmas, sigmas).steps == 10


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [2, 7, 10, 28, 40, 50])
def test_sd3_grid_is_that_of_the_scheduler(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    grid = build_grid(GridConfig(steps=steps, schedule="sd3", shift=shift, timestep="exact"), 1024)
    assert grid.sigmas == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6, abs=0)
    times = [1000 * time for time in grid.timesteps[:-1]]
    assert times == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6, abs=0)
    levels = [grid.level(node)[0] for node in (0.5, steps - 1.5, steps - 1, steps - 0.5, steps)]
    assert levels == sorted(levels, reverse=True)
    for node in (*range(steps + 1), steps / 2):  # the closed form agrees with the nodes
        assert grid.level(node + 1e-12)[0] == pytest.approx(grid.level(node)[0], abs=1e-9)


def test_the_smallest_sigma_of_sd3_is_shifted_twice() -> None:
    sigmas = sd3_sigmas(10, 3.0)
    assert [round(sigma, 3) for sigma in sigmas[:3]] == [1.0, 0.960, 0.913]
    assert [round(sigma, 4) for sigma in sigmas[-3:]] == [0.278, 0.0089, 0.0]
