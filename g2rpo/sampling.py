"""Deterministic sampling of a policy: one image per prompt, by ODE."""

from collections.abc import Sequence

import torch
from torch import Tensor

from g2rpo.data.prompts import Prompt
from g2rpo.flow.forest import Forest
from g2rpo.flow.schedule import SigmaGrid
from g2rpo.flow.sweep import SweepSettings, sweep
from g2rpo.policy import FluxPolicy
from g2rpo.seeds import gaussian


def evaluation_noise(policy: FluxPolicy, seed: int, prompt: Prompt) -> Tensor:
    """The packed initial noise of a held-out prompt, [tokens, channels].

    It depends on (seed, prompt id) alone: not on the batch, the ranks or the policy's weights.
    """
    drawn = gaussian(policy.latent_shape, seed, "evaluation-noise", prompt.id)
    return policy.pack(drawn[None])[0]


@torch.no_grad()
def sample_ode(
    policy: FluxPolicy, prompts: Sequence[Prompt], grid: SigmaGrid, seed: int, batch: int = 64
) -> Tensor:
    """One image per prompt, by Euler steps along ``grid``.

    Args:
        policy: the policy.
        prompts: P prompts; their ids name the noise.
        grid: sigmas and model times.
        seed: the evaluation seed.
        batch: states per velocity evaluation.

    Returns:
        uint8 [P, H, W, 3] on the CPU.
    """
    conditioning = policy.encode([prompt.text for prompt in prompts])
    forest = Forest(grid.steps)
    start = forest.initial(sample=0)
    forest.logged_images.append(forest.follow(start, tuple(range(1, grid.steps))))

    def velocity(latents: Tensor, times: Tensor, prompt_of: Tensor) -> Tensor:
        return policy.velocity(latents, times, conditioning.select(prompt_of))

    def noise(prompt: int, sample: int, step: int) -> Tensor:
        del sample, step  # one sample a prompt, and an ODE draws nothing after the start
        return evaluation_noise(policy, seed, prompts[prompt])

    settings = SweepSettings((0.0,) * grid.steps, micro_batch=batch, device=policy.device)
    swept = sweep(forest, grid, len(prompts), velocity, noise, settings)
    return policy.decode(swept.images[:, 0])
