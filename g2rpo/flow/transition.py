"""One step along the grid: ODE and SDE moments, and the log-probability of an SDE step.

Convention: x_sigma = (1 - sigma) x_0 + sigma eps, velocity v = eps - x_0. A step goes from sigma to
a smaller sigma', so Delta = sigma' - sigma < 0. The one SDE family

    mean = x [1 + g^2 Delta / (2 sigma)] + v [1 + g^2 (1 - sigma) / (2 sigma)] Delta
    std  = g sqrt(-Delta)

covers most methods; they differ in the diffusion coefficient g, and g = 0 is the ODE (Euler) step.
Coefficient-preserving sampling (CPS, arXiv 2509.05952) keeps the coefficients of the flow instead:
the image prediction x - sigma v with weight 1 - sigma', and noise of total size sigma'.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from g2rpo.flow.upload import to_device


@dataclass(frozen=True)
class Transition:
    """The Gaussian law of one step from ``sigma`` to ``sigma_next`` with coefficient ``diffusion``.

    The mean is ``latents_weight * x + velocity_weight * v``; all numbers are float64.
    ``noise_scale`` multiplies the std alone.
    """

    sigma: float
    sigma_next: float
    diffusion: float = 0.0
    noise_scale: float = 1.0

    @property
    def latents_weight(self) -> float:
        """1 + g^2 Delta / (2 sigma)."""
        delta = self.sigma_next - self.sigma
        return 1.0 + self.diffusion**2 * delta / (2.0 * self.sigma)

    @property
    def velocity_weight(self) -> float:
        """[1 + g^2 (1 - sigma) / (2 sigma)] Delta."""
        delta = self.sigma_next - self.sigma
        return (1.0 + self.diffusion**2 * (1.0 - self.sigma) / (2.0 * self.sigma)) * delta

    @property
    def std(self) -> float:
        """g sqrt(-Delta) times the noise scale; zero for the ODE step."""
        return self.noise_scale * self.diffusion * math.sqrt(self.sigma - self.sigma_next)

    def log_prob(
        self, next_latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
    ) -> torch.Tensor:
        """The log-probability [B] of steps of this kind, see :func:`log_prob`."""
        return log_prob(next_latents, mean, std)


@dataclass(frozen=True)
class CPSTransition(Transition):
    """A step of coefficient-preserving sampling; ``diffusion`` is its noise level, in (0, 1].

    The mean is (1 - sigma') x_0 + sqrt(sigma'^2 - std^2) x_1 with the predictions
    x_0 = x - sigma v and x_1 = x + (1 - sigma) v. Source: ``sde_type="cps"`` of Flow-GRPO's code.
    """

    @property
    def _predicted_noise(self) -> float:
        """The weight of x_1: sqrt(sigma'^2 - std^2) without a difference of near equals."""
        return self.sigma_next * math.cos(self.diffusion * math.pi / 2)

    @property
    def latents_weight(self) -> float:
        """Of x in the mean."""
        return 1.0 - self.sigma_next + self._predicted_noise

    @property
    def velocity_weight(self) -> float:
        """Of v in the mean."""
        return self._predicted_noise * (1.0 - self.sigma) - (1.0 - self.sigma_next) * self.sigma

    @property
    def std(self) -> float:
        """sigma' sin(level pi / 2); zero for the last step."""
        return self.sigma_next * math.sin(self.diffusion * math.pi / 2)

    def log_prob(
        self, next_latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
    ) -> torch.Tensor:
        """Minus the mean squared error, [B]: the released code has no std and no constant here."""
        return -((next_latents.detach() - mean) ** 2).flatten(1).mean(dim=1)


Kernel = Literal["sde", "cps"]
KERNELS: dict[Kernel, type[Transition]] = {"sde": Transition, "cps": CPSTransition}


def transitions(
    kernel: Kernel, sigmas: Sequence[float], levels: Sequence[float]
) -> tuple[Transition, ...]:
    """The law of each of the T steps of a grid.

    Args:
        kernel: the name of the law.
        sigmas: T + 1 noise levels.
        levels: g of ``sde``, or the noise level of ``cps``, at each of the T steps.
    """
    law = KERNELS[kernel]
    return tuple(law(*step) for step in zip(sigmas, sigmas[1:], levels, strict=False))


def constant_diffusion(eta: float, sigmas: Sequence[float]) -> tuple[float, ...]:
    """g = eta at every one of the T steps (DanceGRPO)."""
    return (eta,) * (len(sigmas) - 1)


def flow_diffusion(eta: float, sigmas: Sequence[float]) -> tuple[float, ...]:
    """g = eta sqrt(sigma / (1 - sigma)) at each of the T steps (Flow-GRPO, MixGRPO, G2RPO).

    At sigma = 1 the denominator uses sigma_1 instead, as the released code does.
    """
    first_below_one = sigmas[1]
    return tuple(
        eta * math.sqrt(sigma / (1.0 - (first_below_one if sigma == 1.0 else sigma)))
        for sigma in sigmas[:-1]
    )


def second_order_weight(sigma_before: float, sigma: float, sigma_next: float) -> float:
    """What a DPM-Solver++ 2M step adds to the Euler step, per difference of image predictions.

    With m = x - sigma v, lambda = log((1 - sigma) / sigma) and r = (lambda - lambda_before) /
    (lambda_next - lambda), the midpoint variant of arXiv 2211.01095 is the Euler step from sigma to
    ``sigma_next`` > 0 plus (1 - sigma_next / sigma) (m - m_before) / (2 r). After sigma = 1, where
    lambda is minus infinity, nothing is added.
    """
    if sigma_before == 1.0:
        return 0.0
    before, now, following = (math.log((1 - s) / s) for s in (sigma_before, sigma, sigma_next))
    return (1 - sigma_next / sigma) * (following - now) / (2 * (now - before))


def per_state(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """``values`` [B] as a tensor that broadcasts over the latents ``like`` [B, ...]."""
    tensor = torch.tensor(values, dtype=torch.float64).to(like.dtype)
    return to_device(tensor.view(-1, *([1] * (like.dim() - 1))), like.device)


def transition_mean(
    latents: torch.Tensor, velocity: torch.Tensor, transitions: Sequence[Transition]
) -> torch.Tensor:
    """The mean of one step per state.

    Args:
        latents: x [B, ...].
        velocity: v [B, ...], in the dtype of ``latents``.
        transitions: B laws, one per state.

    Rollout and training both use this function, so equal velocities give bit-identical means.
    """
    latents_weight = per_state([t.latents_weight for t in transitions], latents)
    velocity_weight = per_state([t.velocity_weight for t in transitions], latents)
    return latents_weight * latents + velocity_weight * velocity


def log_prob(next_latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Mean over the latent dimensions of the Gaussian log-density.

    Args:
        next_latents: x' [B, ...], treated as data (detached).
        mean: [B, ...].
        std: broadcastable to [B, ...], positive.

    Returns:
        [B]. All released codes take the mean over dimensions where the papers write the full
        density; the clip range 1e-4 only makes sense with the mean.
    """
    error = next_latents.detach() - mean
    density = -(error**2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(dim=1)
