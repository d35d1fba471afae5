"""G2RPO as its released code executes it: one trajectory after the other, sharing nothing.

For each stochastic step and each sample, the velocity at the anchor's state is evaluated again,
each granularity is continued separately, and its image is decoded and scored immediately.
``batched`` runs the samples of a group together: the gain of batching alone.
"""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.speed.stopwatch import Stopwatch
from g2rpo.data.prompts import Prompt
from g2rpo.flow.granularity import continuation_nodes
from g2rpo.flow.schedule import SigmaGrid
from g2rpo.flow.sweep import INITIAL_NOISE, Noise
from g2rpo.flow.transition import Transition, log_prob, per_state, transition_mean
from g2rpo.policy import Policy
from g2rpo.rewards.base import RewardModel


@dataclass(frozen=True)
class Plan:
    """Sizes of one G2RPO iteration on one prompt.

    Attributes:
        steps: the stochastic steps M.
        granularities: the set of granularities.
        group_size: group size G.
        transitions: the law of a stochastic step from each node of the grid.
    """

    steps: tuple[int, ...]
    granularities: tuple[int, ...]
    group_size: int
    transitions: tuple[Transition, ...]

    @property
    def evaluations(self) -> int:
        """NFE of the whole iteration: T + G (|M| + NFE of the continuations)."""
        grid_steps = len(self.transitions)
        continued = sum(
            len(continuation_nodes(step, granularity, grid_steps))
            for step in self.steps
            for granularity in self.granularities
        )
        return grid_steps + self.group_size * (len(self.steps) + continued)

    @property
    def images(self) -> int:
        """Images decoded and scored, including the anchor's."""
        return 1 + len(self.steps) * len(self.granularities) * self.group_size


class Original:
    """One iteration of ``plan`` on one prompt.

    Attributes:
        rewards: [|M| * |granularities|, G] in the order of the engine's groups; NaN if not run.
        images: images decoded and scored so far.
    """

    def __init__(
        self, policy: Policy, reward: RewardModel, grid: SigmaGrid, plan: Plan, watch: Stopwatch
    ) -> None:
        """Takes float32 weights; times the phases ``rollout``, ``decode`` and ``reward``."""
        self.policy, self.reward, self.grid, self.plan, self.watch = (
            policy, reward, grid, plan, watch,
        )  # fmt: skip
        groups = len(plan.steps) * len(plan.granularities)
        self.rewards = torch.full((groups, plan.group_size), torch.nan)
        self.images = 0

    @torch.no_grad()
    def run(self, prompt: Prompt, noise: Noise, *, batched: bool, every: int) -> None:
        """Rolls out ``prompt`` and scores its images.

        Runs every n-th (step, sample), or step if ``batched``; ``every=1`` runs all.
        """
        self.prompt, self.noise = prompt, noise
        self.conditioning = self.policy.encode([prompt.text])
        if batched:
            self.policy.vae.disable_tiling()
        else:
            self.policy.vae.enable_tiling()
        group = list(range(self.plan.group_size))
        samples = [group] if batched else [[sample] for sample in group]
        with self.precision():
            anchor = self._anchor()
            self._score(anchor[-1])
            for step, chosen in list(itertools.product(self.plan.steps, samples))[::every]:
                self._branch(step, chosen, anchor[step])

    def precision(self) -> AbstractContextManager[None]:
        """bfloat16 autocast over float32 weights on a GPU, as released; float32 on the CPU."""
        if self.policy.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def _anchor(self) -> list[Tensor]:
        """The deterministic trajectory: a state [1, ...] for each node."""
        with self.watch.phase("rollout"):
            states = [self._noise([0], INITIAL_NOISE)]
            for node in range(self.grid.steps):
                states.append(self._euler(states[-1], node, node + 1))
        return states

    def _branch(self, step: int, samples: Sequence[int], state: Tensor) -> None:
        """Takes the stochastic step of ``samples`` and continues it at every granularity."""
        plan = self.plan
        law = plan.transitions[step]
        with self.watch.phase("rollout"):
            states = state.expand(len(samples), *state.shape[1:])
            velocity = self._velocity(states, step)
            mean = transition_mean(states, velocity, [law] * len(samples))
            moved = mean + law.std * self._noise(samples, step)
            log_prob(moved, mean, per_state([law.std] * len(samples), mean))
        for place, granularity in enumerate(plan.granularities):
            with self.watch.phase("rollout"):
                nodes = (*continuation_nodes(step, granularity, self.grid.steps), self.grid.steps)
                latents = moved
                for node, following in itertools.pairwise(nodes):
                    latents = self._euler(latents, node, following)
            group = plan.steps.index(step) * len(plan.granularities) + place
            self.rewards[group, list(samples)] = self._score(latents)

    def _euler(self, latents: Tensor, node: int, following: int) -> Tensor:
        delta = self.grid.sigmas[following] - self.grid.sigmas[node]
        return latents + self._velocity(latents, node) * delta

    def _velocity(self, latents: Tensor, node: int) -> Tensor:
        times = latents.new_full((len(latents),), self.grid.timesteps[node])
        prompts = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
        return self.policy.velocity(latents, times, self.conditioning.select(prompts))

    def _score(self, latents: Tensor) -> Tensor:
        self.images += len(latents)
        with self.watch.phase("decode"):
            pixels = self.policy.decode(latents)
        return self.reward.score(pixels, [self.prompt.text] * len(latents))

    def _noise(self, samples: Sequence[int], step: int) -> Tensor:
        drawn = torch.stack([self.noise(0, sample, step) for sample in samples])
        return drawn.to(self.policy.device)
