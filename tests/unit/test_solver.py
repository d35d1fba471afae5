"""DPM-Solver++ 2M in the sweep: against plain loops, diffusers, and an ODE solved exactly."""

import math
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from g2rpo.flow.rollout_tree import RolloutTree
from g2rpo.flow.schedule import GridConfig, SigmaGrid, build_grid
from g2rpo.flow.sweep import INITIAL_NOISE, SweepSettings, sweep
from g2rpo.methods.base import Method, RolloutShape, parse_method
from g2rpo.methods.mix_grpo import MixGRPO
from g2rpo.methods.ode import ODE
from g2rpo.methods.presets import load_preset

PROMPTS, DIMENSIONS = 2, 6
F64 = torch.float64


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


WEIGHTS, SHIFTS = drawn(DIMENSIONS, DIMENSIONS, seed=1), drawn(PROMPTS, DIMENSIONS, seed=2)


def velocity(x: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
    return 1.5 * torch.tanh(x @ WEIGHTS / 2 + SHIFTS[prompt] * torch.cos(5 * time[:, None]))


def noise(prompt: int, sample: int, step: int) -> Tensor:
    return drawn(DIMENSIONS, seed=1000 * prompt + 40 * sample + step + 1)


def grid_of(steps: int) -> SigmaGrid:
    return build_grid(GridConfig(steps=steps, timestep="truncated"), image_tokens=16)


def one(x: Tensor, time: float, prompt: int) -> Tensor:
    times, prompts = torch.tensor([time], dtype=F64), torch.tensor([prompt])
    return velocity(x[None], times, prompts)[0]


def solved(
    x: Tensor,
    sigmas: Sequence[float],
    times: Sequence[float],
    prompt: int,
    history: tuple[float, Tensor] | None = None,
) -> Tensor:
    """The textbook loop: half-log-SNR, midpoint rule, first order without history and at the end.

    ``history`` is an earlier sigma and the image prediction there.
    """
    for s, t, time in zip(sigmas, sigmas[1:], times, strict=False):
        m = x - s * one(x, time, prompt)
        if t == 0:
            return m
        lam = {sigma: math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf for sigma in (s, t)}
        h = lam[t] - lam[s]
        factor = -(1 - t) * math.expm1(-h)
        after = t / s * x + factor * m
        if history is not None and history[0] < 1:
            before = math.log((1 - history[0]) / history[0])
            after = after + 0.5 * factor * (m - history[1]) * h / (lam[s] - before)
        x, history = after, (s, m)
    raise AssertionError("the last sigma is 0")


def run(
    method: Method, shape: RolloutShape, iteration: int = 0, dtype: torch.dtype = F64
) -> tuple[RolloutTree, Tensor, int]:
    """The tree, the images of its first group [P, G, ...], and the velocity evaluations."""
    grid, tree = grid_of(shape.steps), method.rollout_tree(shape, iteration)
    laws = method.transitions(grid.sigmas)
    swept = sweep(tree, grid, PROMPTS, velocity, noise, SweepSettings(laws, 5, dtype))
    place = {state: index for index, state in enumerate(tree.images)}
    images = swept.images[:, [place[state] for state in tree.groups[0].images]]
    assert swept.velocity_evaluations == PROMPTS * tree.velocity_evaluations
    return tree, images, tree.velocity_evaluations


# --- whole trajectories --------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 10])
def test_every_ode_trajectory_equals_the_plain_loop(steps: int) -> None:
    shape, grid = RolloutShape(steps, 3, 10), grid_of(steps)
    solvers: tuple[Literal["euler", "dpm2m"], ...] = ("euler", "dpm2m")
    for solver in solvers:
        method = ODE(solver=solver)
        tree, images, evaluations = run(method, shape)
        assert tree.recorded == []
        assert evaluations == steps * 3
        for prompt in range(PROMPTS):
            for sample in range(3):
                start = x = noise(prompt, sample, INITIAL_NOISE)
                for s, t, time in zip(grid.sigmas, grid.sigmas[1:], grid.timesteps, strict=False):
                    x = x + (t - s) * one(x, time, prompt)
                if solver == "dpm2m":
                    euler, x = x, solved(start, grid.sigmas, grid.timesteps, prompt)
                    # Of three steps the second has only the history at sigma = 1, which is none.
                    assert bool((euler - x).abs().max() > 1e-3) == (steps > 3)
                torch.testing.assert_close(images[prompt, sample], x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [4, 10])
def test_dpm2m_is_that_of_diffusers(steps: int) -> None:
    grid = grid_of(steps)
    _, images, _ = run(ODE(solver="dpm2m"), RolloutShape(steps, 1, 10))
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        prediction_type="flow_prediction", use_flow_sigmas=True,
    )  # fmt: skip
    for prompt in range(PROMPTS):
        scheduler.set_timesteps(steps)
        scheduler.sigmas = torch.tensor(grid.sigmas, dtype=F64)
        x = noise(prompt, 0, INITIAL_NOISE)
        for index, time in enumerate(grid.timesteps[:-1]):
            predicted = one(x, time, prompt)
            x = scheduler.step(predicted, scheduler.timesteps[index], x).prev_sample
        # The scheduler's own arithmetic is in float32.
        torch.testing.assert_close(images[prompt, 0].float(), x.float(), rtol=1e-5, atol=1e-5)


def test_the_solvers_converge_with_their_orders() -> None:
    """Data N(0, 2): v = x s'(sigma) / s(sigma), s^2 = 2 (1 - sigma)^2 + sigma^2.

    Between sigma = 0.9 and 0.1, where lambda is finite. Along a trajectory x / s is constant.
    """

    def exact(x: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        sigma = time[:, None]
        return x * (sigma - 2 * (1 - sigma)) / (2 * (1 - sigma) ** 2 + sigma**2)

    def error(solver: Literal["euler", "dpm2m"], steps: int) -> float:
        sigmas = tuple(torch.linspace(0.9, 0.1, steps + 1, dtype=F64).tolist())
        tree = ODE(solver=solver).rollout_tree(RolloutShape(steps, 1, 1), 0)
        settings = SweepSettings((), 1, F64)
        swept = sweep(tree, SigmaGrid(sigmas, sigmas), 1, exact, noise, settings)
        scale = math.sqrt((2 * 0.9**2 + 0.1**2) / (2 * 0.1**2 + 0.9**2))
        return float((swept.images[0, 0] - scale * noise(0, 0, INITIAL_NOISE)).abs().max())

    assert math.log2(error("euler", 80) / error("euler", 160)) == pytest.approx(1, abs=0.05)
    assert math.log2(error("dpm2m", 80) / error("dpm2m", 160)) == pytest.approx(2, abs=0.05)


# --- MixGRPO-Flash -------------------------------------------------------------------------------

# Steps T, window size, iteration, ratio.
FLASH = [
    (25, 4, 0, 0.4), (16, 4, 0, 0.4), (16, 4, 4, 0.4), (25, 4, 0, 0.2), (16, 4, 0, 0.2),
    (16, 4, 9, 0.4), (25, 4, 18, 0.4), (16, 4, 13, 0.4), (10, 1, 0, 0.9), (10, 2, 3, 1.0),
]  # fmt: skip


def released_levels(
    steps: int, last: int, ratio: float, shift: float = 3.0
) -> tuple[list[float], list[int]]:
    """The published sampler's levels after the last SDE step and its times, in its float32."""
    points = int(max((steps - last) * ratio, 1))
    if points == 1:  # it would end above sigma = 0
        points = 2
    start = torch.linspace(1, 0, steps + 1)[last + 1].item()
    u = torch.linspace(start, 0, points)
    sigmas = shift * u / (1 + (shift - 1) * u)
    return sigmas.tolist(), [int(sigma * 1000) for sigma in sigmas]


@pytest.mark.parametrize(("steps", "size", "iteration", "ratio"), FLASH)
def test_every_flash_trajectory_equals_the_plain_loop(
    steps: int, size: int, iteration: int, ratio: float
) -> None:
    method = MixGRPO(window_size=size, interval=1, post_window_ratio=ratio)
    shape, grid = RolloutShape(steps, 3, 100), grid_of(steps)
    _, images, evaluations = run(method, shape, iteration)
    window = list(method.window(shape, method.phase(shape, iteration)))
    first, last = window[0], window[-1]
    sigmas, times = released_levels(steps, last, ratio)
    # Before the window all share one trajectory, whose last state is that of the first SDE step.
    assert evaluations == (first + 1) + 3 * (last - first + len(sigmas) - 1)
    exact = [1 - (last + 1 + i * (steps - last - 1) / (len(sigmas) - 1)) / steps
             for i in range(len(sigmas) - 1)]  # fmt: skip
    levels = [3 * u / (1 + 2 * u) for u in exact] + [0.0]
    assert levels == pytest.approx(sigmas, abs=1e-6)
    laws = method.transitions(grid.sigmas)
    for prompt in range(PROMPTS):
        for sample in range(3):
            x = noise(prompt, 0, INITIAL_NOISE)
            for k in range(last + 1):
                s, v = grid.sigmas[k], one(x, grid.timesteps[k], prompt)
                history = (s, x - s * v)
                if k in window:
                    law = laws[k]
                    x = law.latents_weight * x + law.velocity_weight * v
                    x = x + law.std * noise(prompt, sample, k)
                else:
                    x = x + (grid.sigmas[k + 1] - s) * v
            x = solved(x, levels, [time / 1000 for time in times], prompt, history)
            torch.testing.assert_close(images[prompt, sample], x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "iteration", "steps", "nfe"),
    [
        # T, then the steps to the end of the window and of the solver: 22 nodes x 0.4, less one.
        ("mix_grpo_flash", 0, 25, 4 + 7),
        ("mix_grpo_flash", 40, 25, 6 + 7),
        ("mix_grpo_flash_star", 40, 25, 4 + 3),
        ("mix_grpo_flash_star", 40, 16, 4 + 1),
        ("mix_grpo_flash", 0, 16, 4 + 4),
    ],
)
def test_evaluations_of_the_flash_presets(name: str, iteration: int, steps: int, nfe: int) -> None:
    method = parse_method(load_preset(name, "released")["method"])
    tree = method.rollout_tree(RolloutShape(steps, 1, 300), iteration)
    assert tree.velocity_evaluations == nfe
    assert len(tree.recorded) == 4
    assert max(state.node for state in tree.states) == steps


def test_the_window_of_flash_star_never_moves() -> None:
    method = parse_method(load_preset("mix_grpo_flash_star", "matched")["method"])
    assert {method.phase(RolloutShape(16, 2, 300), i) for i in range(300)} == {0}


def test_a_stretch_has_no_levels_between_its_nodes() -> None:
    grid = grid_of(8)
    assert grid.level(2) == (grid.sigmas[2], grid.timesteps[2])
    sigma, time = grid.level(2.5)
    assert grid.sigmas[3] < sigma < grid.sigmas[2]
    assert time == int(1000 * sigma) / 1000
    with pytest.raises(ValueError, match=r"node 0.5"):
        grid.stretch(2, 6).level(0.5)
