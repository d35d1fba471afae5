"""Transition kernels: textbook forms, log-probability, and the marginals of the SDE."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from g2rpo.flow.schedule import shifted_sigmas
from g2rpo.flow.transition import (
    CPSTransition,
    Transition,
    constant_diffusion,
    flow_diffusion,
    log_prob,
    per_state,
    transition_mean,
    transitions,
)

SHAPE = (5, 4, 3)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drift_and_score_mean(
    x: torch.Tensor, v: torch.Tensor, sigma: float, sigma_next: float, g: float
) -> torch.Tensor:
    """Euler-Maruyama of the reverse SDE: probability-flow drift and half of g^2 times the score."""
    x0 = x - sigma * v
    score = -(x - (1 - sigma) * x0) / sigma**2
    step = sigma_next - sigma
    return x + (v - 0.5 * g**2 * score) * step


def one_step(x: torch.Tensor, v: torch.Tensor, law: Transition) -> torch.Tensor:
    return transition_mean(x, v, [law] * len(x))


# --- moments of one step -------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 7, 14, 15])
def test_flow_form_equals_flow_grpo_as_written(index: int) -> None:
    sigmas = shifted_sigmas(16, 3.0)
    law = Transition(sigmas[index], sigmas[index + 1], flow_diffusion(0.7, sigmas)[index])
    x, v = random(*SHAPE), random(*SHAPE, seed=1)
    sigma = sigmas[index]
    dt = sigmas[index + 1] - sigma
    std_dev_t = 0.7 * (sigma / (1 - (sigmas[1] if index == 0 else sigma))) ** 0.5
    square = std_dev_t**2
    mean = x * (1 + square / (2 * sigma) * dt) + v * (1 + square * (1 - sigma) / (2 * sigma)) * dt
    torch.testing.assert_close(one_step(x, v, law), mean, rtol=1e-13, atol=1e-13)
    assert law.std == pytest.approx(std_dev_t * math.sqrt(-dt), rel=1e-13)


@pytest.mark.parametrize("index", [0, 1, 7, 15])
def test_constant_form_equals_dance_grpo_as_written(index: int) -> None:
    sigmas = shifted_sigmas(16, 3.0)
    g = constant_diffusion(0.3, sigmas)
    assert g == (0.3,) * 16
    x, v = random(*SHAPE), random(*SHAPE, seed=1)
    sigma = sigmas[index]
    dsigma = sigmas[index + 1] - sigma
    mean = x + dsigma * v
    score = -(x - (x - sigma * v) * (1 - sigma)) / sigma**2
    mean = mean + -0.5 * 0.3**2 * score * dsigma
    law = Transition(sigma, sigmas[index + 1], 0.3)
    torch.testing.assert_close(one_step(x, v, law), mean, rtol=1e-12, atol=1e-12)
    assert law.std == pytest.approx(0.3 * math.sqrt(sigma - sigmas[index + 1]), rel=1e-14)


def test_without_diffusion_it_is_the_euler_step() -> None:
    x, v = random(*SHAPE), random(*SHAPE, seed=1)
    law = Transition(0.8, 0.35)
    torch.testing.assert_close(one_step(x, v, law), x - 0.45 * v, rtol=1e-14, atol=1e-14)
    assert law.std == 0.0


def test_a_step_to_zero_without_diffusion_is_the_image_prediction() -> None:
    x0, noise = random(*SHAPE), random(*SHAPE, seed=1)
    x = 0.3 * x0 + 0.7 * noise
    image = one_step(x, noise - x0, Transition(0.7, 0.0))
    torch.testing.assert_close(image, x0, rtol=1e-13, atol=1e-13)


def test_flow_diffusion_uses_the_second_sigma_only_where_sigma_is_one() -> None:
    assert flow_diffusion(0.5, (1.0, 0.8, 0.5, 0.0)) == pytest.approx(
        (0.5 * math.sqrt(1 / 0.2), 0.5 * math.sqrt(0.8 / 0.2), 0.5)
    )
    assert flow_diffusion(0.5, (0.9, 0.8, 0.0)) == pytest.approx(
        (0.5 * math.sqrt(0.9 / 0.1), 0.5 * math.sqrt(0.8 / 0.2))
    )


def test_every_state_has_its_own_law() -> None:
    x, v = random(*SHAPE), random(*SHAPE, seed=1)
    laws = [Transition(1.0 - 0.1 * i, 0.9 - 0.15 * i, 0.2 * i) for i in range(len(x))]
    together = transition_mean(x, v, laws)
    for i, law in enumerate(laws):
        assert torch.equal(together[i], one_step(x[i : i + 1], v[i : i + 1], law)[0])


# --- coefficient-preserving sampling -------------------------------------------------------------


@pytest.mark.parametrize("level", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("index", [0, 1, 4, 9])
def test_cps_keeps_the_coefficients_of_the_flow(index: int, level: float) -> None:
    """With an exact velocity, x' is (1 - sigma') x0 and noise of variance sigma'^2."""
    sigmas = shifted_sigmas(10, 3.0)
    law = transitions("cps", sigmas, (level,) * 10)[index]
    assert isinstance(law, CPSTransition)
    x0, noise = random(*SHAPE), random(*SHAPE, seed=1)
    sigma, after = sigmas[index], sigmas[index + 1]
    mean = one_step((1 - sigma) * x0 + sigma * noise, noise - x0, law)
    weight_of_noise = (mean - (1 - after) * x0) / noise
    assert float(weight_of_noise.std()) < 1e-10
    kept = float(weight_of_noise.mean())
    assert kept**2 + law.std**2 == pytest.approx(after**2, rel=1e-12, abs=1e-24)
    assert law.std == pytest.approx(after * math.sin(math.pi * level / 2), rel=1e-14)


def test_cps_has_no_noise_in_the_last_step_and_ends_at_the_prediction() -> None:
    x, v = random(*SHAPE), random(*SHAPE, seed=1)
    law = CPSTransition(0.3, 0.0, 0.8)
    assert law.std == 0
    torch.testing.assert_close(one_step(x, v, law), x - 0.3 * v, rtol=1e-14, atol=1e-14)


def test_the_log_prob_of_cps_is_minus_the_mean_squared_error() -> None:
    mean, after = random(*SHAPE).requires_grad_(), random(*SHAPE, seed=2)
    law = CPSTransition(0.9, 0.7, 0.8)
    value = law.log_prob(after, mean, per_state([law.std] * 5, mean))
    for i in range(5):
        pairs = zip(after[i].flatten().tolist(), mean[i].flatten().tolist(), strict=True)
        assert float(value[i].detach()) == pytest.approx(-sum((a - m) ** 2 for a, m in pairs) / 12)
    value.sum().backward()
    torch.testing.assert_close(mean.grad, 2 * (after - mean.detach()) / 12)


# --- log-probability -----------------------------------------------------------------------------


def test_log_prob_is_the_mean_normal_log_density() -> None:
    mean, after = random(*SHAPE), random(*SHAPE, seed=2)
    stds = [0.05, 0.3, 1.0, 2.0, 0.7]
    value = log_prob(after, mean, per_state(stds, mean))
    for i, std in enumerate(stds):
        normal = torch.distributions.Normal(mean[i], std)
        assert float(value[i]) == pytest.approx(float(normal.log_prob(after[i]).mean()), rel=1e-13)


def test_log_prob_treats_the_next_latents_as_data() -> None:
    mean = random(*SHAPE).requires_grad_()
    after = random(*SHAPE, seed=2).requires_grad_()
    log_prob(after, mean, per_state([0.4] * 5, mean)).sum().backward()
    assert after.grad is None
    assert mean.grad is not None
    expected = (after.detach() - mean.detach()) / 0.4**2 / 12
    torch.testing.assert_close(mean.grad, expected, rtol=1e-12, atol=1e-12)


# --- marginals on a Gaussian toy -----------------------------------------------------------------

CENTER, SPREAD = 0.8, 0.6


def exact_moments(sigma: float) -> tuple[float, float]:
    """Mean and variance of (1 - sigma) x0 + sigma eps for x0 ~ N(CENTER, SPREAD^2)."""
    return (1 - sigma) * CENTER, (1 - sigma) ** 2 * SPREAD**2 + sigma**2


def exact_velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[eps - x0 | x]: joint Gaussian, so the regression of eps - x0 on x."""
    mean, variance = exact_moments(sigma)
    covariance = sigma - (1 - sigma) * SPREAD**2
    return -CENTER + covariance / variance * (x - mean)


def chain_moments(
    sigmas: Sequence[float], diffusion: Sequence[float], step: Callable[..., torch.Tensor]
) -> tuple[float, float]:
    """Moments after all steps; each step's mean is affine in x, so two points tell it."""
    mean, variance = exact_moments(sigmas[0])
    for sigma, after, g in zip(sigmas, sigmas[1:], diffusion, strict=False):
        points = torch.tensor([0.0, 1.0], dtype=torch.float64)
        at_zero, at_one = step(points, exact_velocity(points, sigma), sigma, after, g).tolist()
        slope = at_one - at_zero
        mean = slope * mean + at_zero
        variance = slope**2 * variance + g**2 * (sigma - after)
    return mean, variance


def kernel(x: torch.Tensor, v: torch.Tensor, sigma: float, after: float, g: float) -> torch.Tensor:
    return transition_mean(x, v, [Transition(sigma, after, g)] * len(x))


def straight(first: float, last: float, steps: int) -> list[float]:
    return [first + (last - first) * i / steps for i in range(steps + 1)]


@pytest.mark.parametrize(
    ("first", "last", "law"),
    [
        (1.0, 0.0, lambda sigmas: constant_diffusion(0.3, sigmas)),
        (1.0, 0.0, lambda sigmas: constant_diffusion(1.0, sigmas)),
        (1.0, 0.4, lambda sigmas: constant_diffusion(0.6, sigmas)),
        (0.9, 0.0, lambda sigmas: flow_diffusion(0.7, sigmas)),
        (0.9, 0.3, lambda sigmas: flow_diffusion(0.7, sigmas)),
        (1.0, 0.0, lambda sigmas: constant_diffusion(0.0, sigmas)),
    ],
)
def test_marginals_converge_at_order_one(
    first: float, last: float, law: Callable[[Sequence[float]], tuple[float, ...]]
) -> None:
    errors = []
    for steps in (400, 800, 1600):
        sigmas = straight(first, last, steps)
        mean, variance = chain_moments(sigmas, law(sigmas), kernel)
        exact_mean, exact_variance = exact_moments(last)
        # The score vanishes on average, and the mean path is straight: no step errs in the mean.
        assert mean == pytest.approx(exact_mean, abs=1e-12)
        errors.append(abs(variance - exact_variance))
    assert 1.85 < errors[0] / errors[1] < 2.15
    assert 1.9 < errors[1] / errors[2] < 2.1
    assert 1e-6 < errors[2] < 5e-3
