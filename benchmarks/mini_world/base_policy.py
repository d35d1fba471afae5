"""Trains a small base policy with its text encoders by flow matching on latents."""

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from pydantic import Field
from torch import Tensor, nn

from benchmarks.mini_world import autoencoder
from benchmarks.mini_world.attribute_training import caption_shares
from benchmarks.mini_world.pictures import draw_pool
from benchmarks.mini_world.training import OneCycle
from g2rpo.config import StrictModel
from g2rpo.progress import ProgressReport
from g2rpo.rewards.attributes import AttributeReader

SHIFT = 3.0
CLIP_TOKENS, T5_TOKENS = 22, 20
"""Padded caption lengths of CLIP (with start and end tokens) and T5 (with an end token)."""
LATENT_CHANNELS, LATENT_SIDE = 16, 8


class PolicySettings(StrictModel):
    """Training of a base policy."""

    scenes: int = Field(default=24000, ge=1)
    steps: int = Field(default=4000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1.5e-3, gt=0)
    warmup_steps: int = Field(default=100, ge=1)
    ema_decay: float = Field(default=0.999, gt=0, lt=1)
    check_every: int = Field(default=100, ge=1)
    check_steps: int = Field(default=8, ge=1)
    """Sampling steps of the accuracy checks."""
    stop_accuracy: float = Field(default=0.73, gt=0, le=1)
    """Training stops at the first validation check with this accuracy: early, so that the policy
    errs visibly and reinforcement learning has room to improve it."""


@dataclass
class Policy(ABC):
    """A transformer with its text encoders and tokenizers, called as in its pipeline."""

    kind: ClassVar[type[DiffusionPipeline]]
    """The diffusers pipeline of the architecture."""

    def pipeline(self, vae: AutoencoderKL) -> DiffusionPipeline:
        """The diffusers pipeline of the trained modules and ``vae``."""
        names = (field.name for field in dataclasses.fields(self) if field.name != "settings")
        parts = {name: getattr(self, name) for name in names}
        return self.kind(scheduler=scheduler(), vae=vae, **parts)

    @abstractmethod
    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Token ids ``[N, L]`` of each tokenizer, padded as the pipeline pads them."""

    @abstractmethod
    def velocity(self, latents: Tensor, sigma: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
        """Velocity at packed latents, time ``sigma [B]`` and token ids; of the latents' shape."""

    def guided(self, latents: Tensor, sigma: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
        """The velocity for sampling."""
        return self.velocity(latents, sigma, tokens)

    def drop(self, tokens: tuple[Tensor, ...], draws: torch.Generator) -> tuple[Tensor, ...]:
        """Token ids for a training step, of which some captions may be replaced by the empty."""
        del draws
        return tokens

    def pack(self, latents: Tensor) -> Tensor:
        """Latents ``[B, 16, 8, 8]`` as the transformer takes them."""
        return latents

    def unpack(self, latents: Tensor) -> Tensor:
        """Inverse of :meth:`pack`."""
        return latents

    def trained(self) -> nn.ModuleDict:
        """The transformer and all text encoders, which the flow-matching loss trains."""
        modules = {key: value for key, value in vars(self).items() if isinstance(value, nn.Module)}
        return nn.ModuleDict(modules)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a pipeline."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False
    )


def shifted(u: Tensor) -> Tensor:
    """The time ``sigma`` of uniform ``u`` on the grid with shift 3."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


@torch.no_grad()
def sample(policy: Policy, captions: Sequence[str], steps: int, seed: int) -> Tensor:
    """Normalised latents ``[N, 16, 8, 8]`` by ``steps`` Euler steps on the shifted grid."""
    noise = torch.Generator().manual_seed(seed)
    shape = (len(captions), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    latents = policy.pack(torch.randn(shape, generator=noise))
    tokens = policy.tokens(captions)
    grid = shifted(torch.linspace(1, 0, steps + 1))
    for sigma, following in itertools.pairwise(grid):
        velocity = policy.guided(latents, sigma.expand(len(latents)), tokens)
        latents = latents + (following - sigma) * velocity
    return policy.unpack(latents)


class MovingAverage:
    """EMA of the trained parameters, swapped in for checks."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.parameters = list(module.parameters())
        self.decay = decay
        self.steps = 0
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Adds the current parameters, with a smaller decay in the first steps."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges parameters and averages."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            present = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(present)


def train(
    policy: Policy,
    settings: PolicySettings,
    seed: int,
    vae: AutoencoderKL,
    check: Callable[[Policy], float],
) -> dict[str, Any]:
    """Trains ``policy`` on training scenes; returns what it measured.

    ``check`` returns the accuracy of a policy on validation captions; it must not draw from the
    training's generators.
    """
    trained = policy.trained()
    pool = draw_pool(seed, "base-policy", "train", settings.scenes)
    latents = policy.pack(autoencoder.encode(vae, pool.images))
    tokens = policy.tokens(pool.captions)
    del pool
    optimizer = OneCycle(
        trained.parameters(), settings.learning_rate, settings.steps,
        settings.warmup_steps / settings.steps, final_div_factor=10,
        betas=(0.9, 0.99), weight_decay=0.01, fused=True,
    )  # fmt: skip
    average = MovingAverage(trained, settings.ema_decay)
    draws = torch.Generator().manual_seed(seed)
    history: list[tuple[int, float]] = []
    running, step = 0.0, 0
    with ProgressReport("base policy", settings.steps) as progress:
        for step in range(1, settings.steps + 1):
            index = torch.randint(len(latents), (settings.batch_size,), generator=draws)
            clean = latents[index]
            noise = torch.randn(clean.shape, generator=draws)
            sigma = shifted(torch.rand(len(clean), generator=draws))
            mixed = torch.lerp(clean, noise, sigma.view(-1, *[1] * (clean.ndim - 1)))
            chosen = policy.drop(tuple(ids[index] for ids in tokens), draws)
            velocity = policy.velocity(mixed, sigma, chosen)
            loss = (velocity - (noise - clean)).square().mean()
            optimizer.step(loss)
            average.update()
            running = loss.item() if step == 1 else 0.99 * running + 0.01 * loss.item()
            progress.update(step, f"loss {running:.4f}")
            if step % settings.check_every == 0 or step == settings.steps:
                average.swap()
                accuracy = check(policy)
                history.append((step, round(accuracy, 4)))
                average.swap()
                progress.update(step, f"loss {running:.4f}, accuracy {accuracy:.4f}", always=True)
                if accuracy >= settings.stop_accuracy:
                    break
        seconds = progress.seconds
    average.swap()
    return {
        "parameters": {
            name: sum(p.numel() for p in module.parameters()) for name, module in trained.items()
        },
        "steps_taken": step,
        "training_loss": round(running, 5),
        "validation_accuracy": history,
        "training_seconds": round(seconds, 1),
    }


@dataclass(frozen=True)
class AttributeCheck:
    """Scores samples of a policy with the attribute reader, always from the same noise."""

    reader: AttributeReader
    vae: AutoencoderKL
    captions: list[str]
    steps: int
    seed: int = 0

    def shares(self, policy: Policy) -> list[float]:
        """The share of each caption's attributes that its sample shows."""
        latents = sample(policy, self.captions, self.steps, self.seed)
        return caption_shares(self.reader, autoencoder.decode(self.vae, latents), self.captions)

    def accuracy(self, policy: Policy) -> float:
        """The mean share."""
        shares = self.shares(policy)
        return sum(shares) / len(shares)

    def report(self, policy: Policy) -> dict[str, float]:
        """The mean share, and the share of images with every attribute correct."""
        shares = self.shares(policy)
        correct = sum(value == 1 for value in shares)
        return {
            "attribute_accuracy": round(sum(shares) / len(shares), 4),
            "all_right": round(correct / len(shares), 4),
        }
