"""G2RPO as its released code executes it: one trajectory after the other, nothing shared.

For each stochastic step and each sample: the velocity at the anchor's state is evaluated again, and
each granularity is followed on its own, its image decoded and scored at once. ``batched`` puts the
samples of a group through each of these together, which is all that batching alone gives.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.speed.stopwatch import Stopwatch
from g2rpo.data.prompts import Prompt
from g2rpo.flow.granularity import continuation_nodes
from g2rpo.flow.schedule import SigmaGrid
from g2rpo.flow.sweep import INITIAL_NOISE
from g2rpo.flow.transition import Transition, log_prob, per_state, transition_mean
from g2rpo.policy import FluxPolicy
from g2rpo.policy.conditioning import Conditioning
from g2rpo.rewards.base import RewardModel
from g2rpo.seeds import gaussian


@dataclass(frozen=True)
class Plan:
    """Sizes of one iteration of G2RPO for one prompt.

    Attributes:
        steps: the stochastic steps M.
        granularities: the set of granularities.
        group_size: samples G of a group.
        diffusion: the coefficient of the SDE at each step of the grid.
        seed: the experiment's, which names all noise.
        iteration: of the training.
    """

    steps: tuple[int, ...]
    granularities: tuple[int, ...]
    group_size: int
    diffusion: tuple[float, ...]
    seed: int
    iteration: int

    def evaluations(self, grid_steps: int) -> int:
        """Velocity evaluations of the whole iteration: T + G (|M| + those of continuations)."""
        followed = sum(
            len(continuation_nodes(step, granularity, grid_steps))
            for step in self.steps
            for granularity in self.granularities
        )
        return grid_steps + self.group_size * (len(self.steps) + followed)

    @property
    def images(self) -> int:
        """Images decoded and scored, the anchor's own among them."""
        return 1 + len(self.steps) * len(self.granularities) * self.group_size


@dataclass(frozen=True)
class Executed:
    """What was run, of all that an iteration is.

    Attributes:
        rewards: [|M| * |granularities|, G] in the order of the engine's groups; NaN where not run.
        evaluations: velocity evaluations run.
        images: images decoded and scored.
    """

    rewards: Tensor
    evaluations: int
    images: int


@dataclass(frozen=True)
class Original:
    """The execution itself.

    Attributes:
        policy: its weights in float32.
        reward: the reward model.
        grid: sigmas and times.
        plan: sizes.
        watch: the phases ``rollout``, ``decode`` and ``reward`` go here.
        batched: whether the samples of a group go together.
        every: runs every so many-th (step, sample), or step where ``batched``; 1 runs all.
    """

    policy: FluxPolicy
    reward: RewardModel
    grid: SigmaGrid
    plan: Plan
    watch: Stopwatch
    batched: bool = False
    every: int = 1

    @torch.no_grad()
    def run(self, prompt: Prompt) -> Executed:
        """Rolls out one prompt and scores its images."""
        if self.batched:
            self.policy.vae.disable_tiling()
        else:
            self.policy.vae.enable_tiling()
        return _Run(self, prompt).run()

    def units(self) -> Iterator[tuple[int, Sequence[int]]]:
        """The (step, samples) that are run."""
        everyone = range(self.plan.group_size)
        samples = [list(everyone)] if self.batched else [[sample] for sample in everyone]
        units = [(step, chosen) for step in self.plan.steps for chosen in samples]
        yield from units[:: self.every]

    def precision(self) -> AbstractContextManager[None]:
        """bfloat16 autocast over float32 weights on a GPU, as released; float32 on the CPU."""
        if self.policy.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()


class _Run:
    def __init__(self, original: Original, prompt: Prompt) -> None:
        self.original, self.prompt = original, prompt
        self.policy, self.grid, self.plan = original.policy, original.grid, original.plan
        self.conditioning: Conditioning = self.policy.encode([prompt.text])
        groups = len(self.plan.steps) * len(self.plan.granularities)
        self.rewards = torch.full((groups, self.plan.group_size), torch.nan)
        self.evaluations = self.images = 0

    def run(self) -> Executed:
        with self.original.precision():
            anchor = self._anchor()
            self._score(anchor[-1])
            for step, samples in self.original.units():
                self._branch(step, samples, anchor[step])
        return Executed(self.rewards, self.evaluations, self.images)

    def _anchor(self) -> list[Tensor]:
        """The deterministic trajectory, a state [1, ...] for each node."""
        with self.original.watch.phase("rollout"):
            states = [self._noise(0, INITIAL_NOISE)[None]]
            for node in range(self.grid.steps):
                states.append(self._euler(states[-1], node, node + 1))
        return states

    def _branch(self, step: int, samples: Sequence[int], state: Tensor) -> None:
        """Takes the stochastic step of ``samples`` and finishes it at every granularity."""
        plan, sigmas = self.plan, self.grid.sigmas
        law = Transition(sigmas[step], sigmas[step + 1], plan.diffusion[step])
        with self.original.watch.phase("rollout"):
            states = state.expand(len(samples), *state.shape[1:])
            velocity = self._velocity(states, step)
            mean = transition_mean(states, velocity, [law] * len(samples))
            noise = torch.stack([self._noise(sample, step) for sample in samples])
            moved = mean + law.std * noise
            log_prob(moved, mean, per_state([law.std] * len(samples), mean))
        for place, granularity in enumerate(plan.granularities):
            with self.original.watch.phase("rollout"):
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
        self.evaluations += len(latents)
        times = latents.new_full((len(latents),), self.grid.timesteps[node])
        prompts = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
        return self.policy.velocity(latents, times, self.conditioning.select(prompts))

    def _score(self, latents: Tensor) -> Tensor:
        self.images += len(latents)
        with self.original.watch.phase("decode"):
            pixels = self.policy.decode(latents)
        return self.original.reward.score(pixels, [self.prompt.text] * len(latents))

    def _noise(self, sample: int, step: int) -> Tensor:
        stream = "initial-noise" if step == INITIAL_NOISE else "step-noise"
        key = (self.plan.iteration, self.prompt.id, sample, step)
        drawn = gaussian(self.policy.latent_shape, self.plan.seed, stream, *key)
        return self.policy.pack(drawn[None])[0].to(self.policy.device)
