"""Drift of a trained policy from its base: the difference of velocities on the same inputs.

The inputs are the base's own: x_sigma = (1 - sigma) x_0 + sigma eps, the noising that flow matching
trains on, with x_0 the base's sample of a prompt and eps a draw named by (evaluation seed, prompt
id, index of sigma). They and the base's velocities are computed once and saved, so a large
base and a trained policy are never in memory together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.evaluation.metrics import DRIFT, metric_frame
from benchmarks.evaluation.protocol import DriftConfig
from g2rpo.data.embeddings import rows_digest
from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.files import atomic_path
from g2rpo.flow.schedule import SigmaGrid
from g2rpo.policy import Policy
from g2rpo.progress import ProgressReport
from g2rpo.sampling import sample_latents
from g2rpo.seeds import gaussian


@dataclass(frozen=True, eq=False)
class DriftReference:
    """The fixed inputs and the base's velocities.

    Attributes:
        latents: x_sigma, [prompts, sigmas, ...], float32, on the CPU.
        velocities: the same shape.
    """

    latents: Tensor
    velocities: Tensor

    def save(self, path: Path) -> None:
        """Writes a safetensors file atomically; the last of several writers wins."""
        with atomic_path(path) as temporary:
            tensors = {"latents": self.latents, "velocities": self.velocities}
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(tensors, temporary, {"sha256": rows_digest(tensors)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what :meth:`save` wrote.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in ("latents", "velocities")}
                recorded = opened.metadata()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); recomputing it") from None
        if recorded and recorded.get("sha256") != rows_digest(tensors):
            raise UserError(f"{path}: does not match its recorded SHA-256; recomputing it")
        return cls(**tensors)


def base_reference(
    base: Policy,
    prompts: Sequence[Prompt],
    config: DriftConfig,
    grid: SigmaGrid,
    seed: int,
    batch: int = 64,
) -> DriftReference:
    """Samples the base on ``grid``, noises the samples and evaluates the base on them."""
    chosen = list(prompts[: config.prompts])
    parts = []
    for start in range(0, len(chosen), batch):
        part = chosen[start : start + batch]
        clean = sample_latents(base, part, grid, seed, batch).cpu()
        parts.append(
            torch.stack(
                [
                    _noised(base, *pair, config.sigmas, seed)
                    for pair in zip(clean, part, strict=True)
                ]
            )
        )
    latents = torch.cat(parts)
    return DriftReference(latents, _velocities(base, chosen, latents, config.sigmas, batch))


def _noised(
    policy: Policy, clean: Tensor, prompt: Prompt, sigmas: Sequence[float], seed: int
) -> Tensor:
    """x_sigma of one prompt at each sigma, [sigmas, ...]."""
    drawn = [
        gaussian(policy.latent_shape, seed, "drift-noise", prompt.id, index)
        for index in range(len(sigmas))
    ]
    noise = policy.pack(torch.stack(drawn))
    level = torch.tensor(sigmas, dtype=noise.dtype).view(-1, *[1] * clean.ndim)
    return (1 - level) * clean + level * noise


@torch.no_grad()
def _velocities(
    policy: Policy,
    prompts: Sequence[Prompt],
    latents: Tensor,
    sigmas: Sequence[float],
    batch: int,
) -> Tensor:
    """Velocities [prompts, sigmas, ...] on the CPU.

    Batches do not depend on the policy, so the base reproduces its own velocities exactly.
    """
    conditioning = policy.encode([prompt.text for prompt in prompts])
    flat = latents.flatten(0, 1)
    times = torch.tensor(sigmas, dtype=torch.float32).repeat(len(prompts))
    prompt_of = torch.arange(len(prompts)).repeat_interleave(len(sigmas))
    velocities = torch.empty_like(flat)
    with ProgressReport("velocities", len(flat)) as report:
        for start in range(0, len(flat), batch):
            part = slice(start, start + batch)
            velocities[part] = policy.velocity(
                flat[part].to(policy.device),
                times[part].to(policy.device),
                conditioning.select(prompt_of[part]),
            ).cpu()
            report.advance(len(flat[part]))
    return velocities.view_as(latents)


def measure_drift(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: DriftConfig,
    reference: DriftReference,
    batch: int = 64,
) -> pd.DataFrame:
    """Mean squared difference of the velocities of each prompt, over sigmas and latents.

    Rows of METRIC_TYPES for the prompts and noise levels of ``reference``; exactly 0 for the
    base itself.
    """
    chosen = prompts[: config.prompts]
    moved = _velocities(policy, chosen, reference.latents, config.sigmas, batch)
    squared = (moved.double() - reference.velocities.double()) ** 2
    values = squared.flatten(1).mean(dim=1).numpy()
    return metric_frame(DRIFT, [prompt.id for prompt in chosen], values)


def no_drift(prompts: Sequence[Prompt], config: DriftConfig) -> pd.DataFrame:
    """The drift of the base itself, which is 0."""
    chosen = prompts[: config.prompts]
    return metric_frame(DRIFT, [prompt.id for prompt in chosen], np.zeros(len(chosen)))
