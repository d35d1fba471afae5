"""One iteration's rollout: prompts in; scored images and stochastic transitions out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.flow.forest import Forest
from g2rpo.flow.schedule import SigmaGrid
from g2rpo.flow.sweep import INITIAL_NOISE, RecordedStep, SweepSettings, sweep
from g2rpo.policy import Conditioning, FluxPolicy
from g2rpo.rewards.base import RewardModel
from g2rpo.seeds import gaussian


@dataclass(frozen=True)
class Rollout:
    """What one rollout of P prompts left behind.

    Attributes:
        forest: the states of each prompt.
        conditioning: of the P prompts.
        recorded: the stochastic transitions.
        rewards: for each reward, the score of every distinct image, [P, I] float32.
        velocity_evaluations: how many it took, over the P prompts.
    """

    forest: Forest
    conditioning: Conditioning
    recorded: tuple[RecordedStep, ...]
    rewards: Mapping[str, Tensor]
    velocity_evaluations: int

    def group_rewards(self, name: str) -> Tensor:
        """The rewards of every group, [P, groups, G]."""
        place = {state: index for index, state in enumerate(self.forest.images)}
        rows = [[place[image] for image in group.images] for group in self.forest.groups]
        return self.rewards[name][:, torch.tensor(rows)]

    def logged_rewards(self, name: str) -> Tensor:
        """The rewards of the images that are scored for the log alone, [P, images]."""
        place = {state: index for index, state in enumerate(self.forest.images)}
        return self.rewards[name][:, [place[image] for image in self.forest.logged_images]]


@dataclass(frozen=True)
class RolloutEngine:
    """Draws samples from a policy and scores them.

    Attributes:
        policy: the policy.
        rewards: the reward models by column name.
        grid: sigmas and times.
        settings: diffusion coefficients and batching of the sweep.
        seed: the experiment's seed, which names all noise.
    """

    policy: FluxPolicy
    rewards: Mapping[str, RewardModel]
    grid: SigmaGrid
    settings: SweepSettings
    seed: int

    def run(self, forest: Forest, prompts: Sequence[Prompt], iteration: int) -> Rollout:
        """Rolls out ``forest`` for ``prompts`` and scores every distinct image.

        Raises:
            UserError: a reward is not finite; names iteration, prompt and reward.
        """
        conditioning = self.policy.encode([prompt.text for prompt in prompts])

        def velocity(latents: Tensor, times: Tensor, prompt_of: Tensor) -> Tensor:
            return self.policy.velocity(latents, times, conditioning.select(prompt_of))

        def noise(prompt: int, sample: int, step: int) -> Tensor:
            stream = "initial-noise" if step == INITIAL_NOISE else "step-noise"
            key = (iteration, prompts[prompt].id, sample, step)
            drawn = gaussian(self.policy.latent_shape, self.seed, stream, *key)
            return self.policy.pack(drawn[None])[0]

        swept = sweep(forest, self.grid, len(prompts), velocity, noise, self.settings)
        images = self.policy.decode(swept.images.flatten(0, 1))
        return Rollout(
            forest=forest,
            conditioning=conditioning,
            recorded=swept.recorded,
            rewards=self._score(images, prompts, iteration),
            velocity_evaluations=swept.velocity_evaluations,
        )

    def _score(
        self, images: Tensor, prompts: Sequence[Prompt], iteration: int
    ) -> dict[str, Tensor]:
        per_prompt = len(images) // len(prompts)
        texts = [prompt.text for prompt in prompts for _ in range(per_prompt)]
        scores = {}
        for name, model in self.rewards.items():
            try:
                values = model.score(images, texts)
            except UserError as error:
                raise UserError(f"iteration {iteration + 1}: {error}") from None
            if not bool(torch.isfinite(values).all()):
                prompt = texts[int((~torch.isfinite(values)).nonzero()[0])]
                raise UserError(
                    f"iteration {iteration + 1}: reward {name} is not finite for the prompt "
                    f"{prompt!r}: check that reward model; the last checkpoint is intact"
                )
            scores[name] = values.view(len(prompts), per_prompt)
        return scores
