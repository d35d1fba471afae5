"""One iteration's rollout: from prompts to scored images and stochastic transitions."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from g2rpo.batching import BatchSize
from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import RolloutTree
from g2rpo.flow.schedule import SigmaGrid
from g2rpo.flow.sweep import (
    INITIAL_NOISE,
    Noise,
    RecordedStep,
    SweepSettings,
    Velocities,
    sweep,
)
from g2rpo.policy import Conditioning, Policy
from g2rpo.rewards.base import RewardModel
from g2rpo.seeds import gaussian
from g2rpo.training.advantages import member_means
from g2rpo.training.clock import device_clock
from g2rpo.training.continuation import ContinuationPolicy
from g2rpo.training.scoring import score_slices


@dataclass(frozen=True)
class Rollout:
    """The result of one rollout of P prompts.

    Attributes:
        iteration: counted from 0.
        tree: the states of each prompt.
        conditioning: of the P prompts.
        recorded: the stochastic transitions.
        latents: of all distinct images, at sigma = 0, [P, I, ...].
        sigmas: the T + 1 noise levels of the grid.
        rewards: for each reward, the scores of all distinct images, [P, I] float32.
        velocity_evaluations: the number of velocities evaluated over the P prompts; one is a single
            evaluation of the transformer (NFE) unless it is guided.
        reused_evaluations: those answered by a step cache, without most of the blocks.
        sampling_seconds: device-seconds of sampling, without decoding and scoring.
        states: the latents of every state of ``tree``, [P, states, ...], if kept.
    """

    iteration: int
    tree: RolloutTree
    conditioning: Conditioning
    recorded: tuple[RecordedStep, ...]
    latents: Tensor
    sigmas: tuple[float, ...]
    rewards: Mapping[str, Tensor]
    velocity_evaluations: int
    reused_evaluations: int = 0
    sampling_seconds: float = 0.0
    states: Tensor | None = None

    def group_rewards(self, name: str) -> Tensor:
        """The rewards of every group, [P, groups, G]; samples of one member have their mean."""
        groups = self.tree.groups
        rewards = self._rewards_of(name, [group.images for group in groups])
        return member_means(rewards, groups)

    def group_stds(self, name: str) -> Tensor:
        """The standard deviation of the rewards of every group's members, [P, groups] float64."""
        values, groups = self.group_rewards(name).double(), enumerate(self.tree.groups)
        stds = [values[:, place, :: group.share].std(dim=-1) for place, group in groups]
        return torch.stack(stds, dim=1)

    def logged_rewards(self, name: str) -> Tensor:
        """The rewards of the images that are only logged, [P, images]."""
        return self._rewards_of(name, [self.tree.logged_images])[:, 0]

    def _rewards_of(self, name: str, rows: Sequence[Sequence[int]]) -> Tensor:
        column = {state: index for index, state in enumerate(self.tree.images)}
        columns = [[column[image] for image in row] for row in rows]
        return self.rewards[name][:, torch.tensor(columns, dtype=torch.int64)]


@dataclass(frozen=True)
class RolloutEngine:
    """Draws samples from a policy and scores them.

    Attributes:
        rewards: the reward models by column name.
        seed: the experiment's seed, which determines all noise.
        decode: images decoded at once; None fixes the number of pixels instead.
        overlap: on a GPU, scores images while the next ones are being decoded.
    """

    policy: Policy
    rewards: Mapping[str, RewardModel]
    grid: SigmaGrid
    settings: SweepSettings
    seed: int
    continuations: ContinuationPolicy | None = None
    decode: BatchSize | None = None
    overlap: bool = False

    def noise(self, prompts: Sequence[Prompt], iteration: int) -> Noise:
        """The noise of an iteration's rollout, where no draw depends on another."""

        def draw(prompt: int, sample: int, step: int) -> Tensor:
            stream = "initial-noise" if step == INITIAL_NOISE else "step-noise"
            key = (iteration, prompts[prompt].id, sample, step)
            drawn = gaussian(self.policy.latent_shape, self.seed, stream, *key)
            return self.policy.pack(drawn[None])[0]

        return draw

    def run(
        self,
        tree: RolloutTree,
        prompts: Sequence[Prompt],
        iteration: int,
        noise: Noise | None = None,
    ) -> Rollout:
        """Rolls out ``tree`` for ``prompts`` and scores every distinct image.

        ``iteration`` is the key of the noise, unless ``noise`` is given, and named in errors.

        Raises:
            UserError: a reward is not finite; names the iteration, prompt and reward.
        """
        clock = device_clock(self.policy.device)
        started = clock()
        conditioning = self.policy.encode([prompt.text for prompt in prompts])

        def velocity(latents: Tensor, times: Tensor, prompt_of: Tensor) -> Tensor:
            return self.policy.velocity(latents, times, conditioning.select(prompt_of))

        drawn = self.noise(prompts, iteration) if noise is None else noise
        twin = self.continuations
        with nullcontext() if twin is None else twin.rollout(tree, conditioning) as continuations:
            velocities = Velocities(velocity, continuations)
            swept = sweep(tree, self.grid, len(prompts), velocities, drawn, self.settings)
        if self.policy.device.type == "cuda":  # the last evaluations are only queued
            torch.cuda.synchronize(self.policy.device)
        sampled = clock() - started
        slices = self.policy.decode_slices(swept.images.flatten(0, 1), self.decode)
        return Rollout(
            iteration=iteration,
            tree=tree,
            conditioning=conditioning,
            recorded=swept.recorded,
            latents=swept.images,
            sigmas=self.grid.sigmas,
            rewards=self._score(slices, len(tree.images), prompts, iteration),
            velocity_evaluations=swept.velocity_evaluations,
            reused_evaluations=0 if continuations is None else continuations.reused,
            sampling_seconds=sampled,
            states=swept.states,
        )

    def _score(
        self, slices: Iterable[Tensor], per_prompt: int, prompts: Sequence[Prompt], iteration: int
    ) -> dict[str, Tensor]:
        texts = [prompt.text for prompt in prompts for _ in range(per_prompt)]
        overlap = self.overlap and self.policy.device.type == "cuda"
        try:
            scored = score_slices(self.rewards, slices, texts, overlap=overlap)
        except UserError as error:
            raise UserError(f"iteration {iteration + 1}: {error}") from None
        return {name: values.view(len(prompts), per_prompt) for name, values in scored.items()}
