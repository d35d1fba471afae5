"""The grid of noise levels of a trajectory, from noise (sigma = 1) to image (sigma = 0)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from g2rpo.config import StrictModel


class GridConfig(StrictModel):
    """The sigmas of the grid and the times given to the transformer."""

    steps: int = Field(16, ge=2)
    """Denoising steps T (released flag ``--sampling_steps 16``)."""
    schedule: Literal["shifted", "flux_dynamic", "sd3"] = "shifted"
    """``shifted``: the same shift at every resolution, as G²RPO, DanceGRPO and MixGRPO train.
    ``flux_dynamic``: FluxPipeline's grid, whose shift grows with the number of image tokens.
    ``sd3``: StableDiffusion3Pipeline's grid, as Flow-GRPO's released code trains."""
    shift: float = Field(3.0, ge=1e-6, le=1e6)
    """Time shift s of the ``shifted`` and ``sd3`` schedules (released flag ``--shift 3``)."""
    timestep: Literal["exact", "truncated"] = "truncated"
    """``truncated`` gives the transformer int(1000 sigma)/1000, as the released code does."""


@dataclass(frozen=True)
class SigmaGrid:
    """Noise levels sigma_0 = 1 > ... > sigma_T = 0 and the model times at the first T of them.

    Attributes:
        sigmas: T + 1 noise levels, float64.
        timesteps: T + 1 transformer times in [0, 1] (the last is never used).
        shift: s of sigma = s u / (1 + (s - 1) u), u = 1 - node / T; None if unknown.
        truncated: whether times are truncated.
        smallest: u at the last node before T, if it is not 1 / T; before it u is linear in the
            node too.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    shift: float | None = None
    truncated: bool = False
    smallest: float | None = None

    @property
    def steps(self) -> int:
        """The number of denoising steps T."""
        return len(self.sigmas) - 1

    def level(self, node: float) -> tuple[float, float]:
        """The noise level and transformer time at ``node``, which may be between two nodes."""
        if node == int(node):
            return self.sigmas[int(node)], self.timesteps[int(node)]
        if self.shift is None:
            raise ValueError(f"no noise level at node {node} of a grid without a shift")
        u = 1.0 - node / self.steps
        if self.smallest is not None:
            u = float(np.interp(node, (0, self.steps - 1, self.steps), (1, self.smallest, 0)))
        sigma = shifted(u, self.shift)
        if self.truncated:
            return sigma, _truncated(np.array([u], np.float32), self.shift)[0]
        return sigma, sigma

    def stretch(self, first: int, last: int) -> "SigmaGrid":
        """The steps ``first`` to ``last`` - 1 only, with identical floating-point levels.

        It starts below sigma = 1 and ends above 0 unless it includes the grid's ends.
        """
        return SigmaGrid(self.sigmas[first : last + 1], self.timesteps[first : last + 1])


def shifted(u: Any, shift: float) -> Any:
    """sigma = s u / (1 + (s - 1) u) of a number or an array, in its precision.

    Source: the released ``sd3_time_shift``.
    """
    return shift * u / (1.0 + (shift - 1.0) * u)


def shifted_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """linspace(1, 0, T + 1), shifted, in float64."""
    inner = shifted(np.linspace(1.0, 0.0, steps + 1), shift)[1:-1]
    # A shift below 1/2 would round sigma_0 away from 1, where 1 / (1 - sigma) is meaningless.
    return (1.0, *(float(sigma) for sigma in inner), 0.0)


def truncated_times(steps: int, shift: float) -> tuple[float, ...]:
    """int(1000 sigma) / 1000, in the float32 arithmetic of the released code.

    torch's float32 ``linspace`` differs from the rounded float64 one, and a difference in the last
    place changes the truncation (e.g. at T = 7, 13, 14 or 50 with shift 3).
    """
    u = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32, device="cpu")
    return _truncated(u.numpy(), shift)


def _truncated(u: npt.NDArray[np.float32], shift: float) -> tuple[float, ...]:
    return tuple(int(value) / 1000 for value in (1000.0 * shifted(u, shift)).tolist())


def flux_dynamic_shift(image_tokens: int) -> float:
    """e^mu of FluxPipeline for FLUX.1-dev.

    mu grows linearly from 0.5 at 256 image tokens to 1.15 at 4096 (the scheduler's ``base_shift``
    and ``max_shift``), so the shift is about 2.22 at 720x720 and 3.16 at 1024x1024.
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    return math.exp(0.5 + slope * (image_tokens - 256))


def flux_dynamic_sigmas(steps: int, image_tokens: int) -> tuple[float, ...]:
    """FluxPipeline's grid: linspace(1, 1/T, T) shifted by :func:`flux_dynamic_shift`, then 0."""
    shift = flux_dynamic_shift(image_tokens)
    sigmas = shifted(np.linspace(1.0, 1.0 / steps, steps), shift)
    return (*(float(sigma) for sigma in sigmas), 0.0)


def sd3_smallest(shift: float) -> float:
    """The shifted 1/1000, in float32: what diffusers' scheduler takes for the smallest time."""
    return float(shifted(np.float32(1.0) / np.float32(1000.0), shift))


def sd3_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """linspace(1, smallest, T), shifted, then 0: the smallest one has been shifted already.

    Source: diffusers' ``FlowMatchEulerDiscreteScheduler(shift=3.0).set_timesteps(T)``, which
    StableDiffusion3Pipeline and Flow-GRPO's released code use.
    """
    inner = shifted(np.linspace(1.0, sd3_smallest(shift), steps)[1:], shift)
    return (1.0, *(float(sigma) for sigma in inner), 0.0)


def build_grid(config: GridConfig, image_tokens: int) -> SigmaGrid:
    """The grid of ``config`` for latents of ``image_tokens`` packed tokens."""
    smallest = None
    if config.schedule == "sd3":
        shift, smallest = config.shift, sd3_smallest(config.shift)
        sigmas = sd3_sigmas(config.steps, shift)
        times = tuple(int(1000 * sigma) / 1000 for sigma in sigmas)
    elif config.schedule == "flux_dynamic":
        shift = flux_dynamic_shift(image_tokens)
        sigmas = flux_dynamic_sigmas(config.steps, image_tokens)
        times = tuple(int(1000 * sigma) / 1000 for sigma in sigmas)
    else:
        shift = config.shift
        sigmas = shifted_sigmas(config.steps, shift)
        times = truncated_times(config.steps, shift)
    truncated = config.timestep == "truncated"
    return SigmaGrid(sigmas, times if truncated else sigmas, shift, truncated, smallest)
