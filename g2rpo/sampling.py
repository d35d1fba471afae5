"""Deterministic ODE sampling of a policy, with noise keyed by prompt and image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from g2rpo.batching import BatchSize
from g2rpo.data.prompts import Prompt
from g2rpo.flow.rollout_tree import RolloutTree
from g2rpo.flow.schedule import SigmaGrid
from g2rpo.flow.sweep import SweepSettings, sweep
from g2rpo.policy import Conditioning, Policy
from g2rpo.seeds import gaussian


def evaluation_noise(policy: Policy, seed: int, prompt: Prompt, image: int = 0) -> Tensor:
    """The packed initial noise of a held-out prompt's image, [...].

    It depends only on (seed, prompt id, image index), not on batch, ranks or weights. Image 0 is
    the scored one; its key has no index.
    """
    key = (prompt.id, image) if image else (prompt.id,)
    drawn = gaussian(policy.latent_shape, seed, "evaluation-noise", *key)
    return policy.pack(drawn[None])[0]


@torch.no_grad()
def sample_latents(
    policy: Policy,
    prompts: Sequence[Prompt],
    grid: SigmaGrid,
    seed: int,
    batch: int | BatchSize = 64,
    image: int = 0,
) -> Tensor:
    """The packed latents at sigma = 0 of one image per prompt, by Euler steps along ``grid``.

    If the policy has a ``handover``, its base takes the later steps. The noise is keyed by
    ``seed``, prompt id and ``image``. Returns [P, ...] on the policy's device.
    """
    conditioning = policy.encode([prompt.text for prompt in prompts])
    latents = torch.stack([evaluation_noise(policy, seed, prompt, image) for prompt in prompts])
    for walker, stretch in _stretches(policy, grid):
        latents = _walk(walker, conditioning, stretch, latents, batch)
    return latents


def _stretches(policy: Policy, grid: SigmaGrid) -> list[tuple[Policy, SigmaGrid]]:
    """The policies with their non-empty stretches of ``grid``, in order."""
    if policy.handover is None:
        return [(policy, grid)]
    after = min(policy.handover.tuned_steps, grid.steps)
    stretches = [
        (policy, grid.stretch(0, after)),
        (policy.handover.base, grid.stretch(after, grid.steps)),
    ]
    return [(walker, stretch) for walker, stretch in stretches if stretch.steps]


def _walk(
    policy: Policy,
    conditioning: Conditioning,
    grid: SigmaGrid,
    start: Tensor,
    batch: int | BatchSize,
) -> Tensor:
    """Euler steps from ``start`` [P, ...] along ``grid``, which may be a stretch."""
    tree = RolloutTree(grid.steps)
    tree.logged_images.append(tree.follow(tree.initial(sample=0), tuple(range(1, grid.steps))))

    def velocity(latents: Tensor, times: Tensor, prompt_of: Tensor) -> Tensor:
        return policy.velocity(latents, times, conditioning.select(prompt_of))

    def first_latents(prompt: int, sample: int, step: int) -> Tensor:
        del sample, step  # one sample per prompt, and an ODE only needs initial noise
        return start[prompt]

    settings = SweepSettings((), micro_batch=batch, device=policy.device)
    swept = sweep(tree, grid, len(start), velocity, first_latents, settings)
    return swept.images[:, 0]


def sample_ode(
    policy: Policy,
    prompts: Sequence[Prompt],
    grid: SigmaGrid,
    seed: int,
    batch: int | BatchSize = 64,
    image: int = 0,
) -> Tensor:
    """The images of :func:`sample_latents` (same arguments): uint8 [P, H, W, 3] on the CPU."""
    return policy.decode(sample_latents(policy, prompts, grid, seed, batch, image))
