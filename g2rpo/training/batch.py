"""Training data: a rollout's stochastic transitions or images, with advantages and loss."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from g2rpo.data.prompts import Prompt
from g2rpo.flow.sweep import RecordedStep
from g2rpo.flow.transition import Transition, per_state, transition_mean
from g2rpo.flow.upload import to_device
from g2rpo.policy import Conditioning
from g2rpo.seeds import gaussian
from g2rpo.training.advantages import (
    TransitionAdvantages,
    image_advantages,
    transition_advantages,
)
from g2rpo.training.config import OptimizationConfig, TrainConfig
from g2rpo.training.forward import ForwardObjective, FrozenPolicy, NoisedImages, mean_square
from g2rpo.training.objective import TransitionObjective, Transitions, transition_kl
from g2rpo.training.rollout import Rollout


@dataclass(frozen=True)
class TrainingBatch(ABC):
    """N losses at U distinct states, each of which goes through one training forward.

    Attributes:
        conditioning: of the P prompts.
        states: the latents at which the velocity is trained, [U, ...].
        times: the model's time at each state, [U].
        prompts: prompt index of each state, [U] int64.
        state_of: the state of each loss, [N] int64.
        samples: sample index of each loss, [N] int64.
        advantage: [N] float64.
        frozen: velocities of frozen policies at the states, [U, ...].
        weight: of each loss in the sum, which is the mean over its update.
    """

    conditioning: Conditioning
    states: Tensor
    times: Tensor
    prompts: Tensor
    state_of: Tensor
    samples: Tensor
    advantage: Tensor
    frozen: Mapping[FrozenPolicy, Tensor]
    weight: float

    def __len__(self) -> int:
        return len(self.state_of)

    @abstractmethod
    def loss(self, velocity: Tensor, config: TrainConfig) -> "Loss":
        """The loss under a policy with ``velocity`` [U, ...] at the states."""

    def update(self, members: Tensor) -> Self:
        """The update over the losses ``members`` only."""
        part = self._part(torch.unique(self.state_of[members]), members)
        return replace(part, weight=1.0 / len(members))

    def split(self, size: int) -> Iterator[Self]:
        """Micro-batches of at most ``size`` states, with all their losses."""
        for states in torch.split(torch.arange(len(self.states)), size):
            yield self._part(states, torch.nonzero(torch.isin(self.state_of, states)).flatten())

    def _part(self, states: Tensor, members: Tensor) -> Self:
        return replace(self, **self._selected(states, members))

    def _selected(self, states: Tensor, members: Tensor) -> dict[str, Any]:
        """The fields of the part with ``states`` and ``members``."""
        return {
            "states": self.states[states],
            "times": self.times[states],
            "prompts": self.prompts[states],
            "state_of": torch.searchsorted(states, self.state_of[members]),
            "samples": self.samples[members],
            "advantage": self.advantage[members],
            "frozen": {name: value[states] for name, value in self.frozen.items()},
        }


@dataclass(frozen=True)
class Loss:
    """The loss of a batch and its terms.

    Attributes:
        loss: the sum over the batch's losses, times its weight: the mean for a whole update.
        clipped: whether the objective limits a loss, [N] bool.
        kl: the penalty on the distance from the base, summed over the losses; None without one.
        log_prob: of each transition under the policy, [N]; None on the forward process.
        ratio: exp(log_prob - log_prob at the rollout), [N]; None on the forward process.
    """

    loss: Tensor
    clipped: Tensor
    kl: Tensor | None = None
    log_prob: Tensor | None = None
    ratio: Tensor | None = None


@dataclass(frozen=True)
class TransitionBatch(TrainingBatch):
    """N trained transitions from U distinct states.

    Samples that share a state (all of a G2RPO group share x_k) share its training forward.

    Attributes:
        steps: grid step of each state, length U.
        transitions: the law of each state's transition, length U.
        old_means: the mean of each state's step under the rollout policy, [U, ...].
        next_latents: x_{k+1}, [N, ...].
        log_prob: under the rollout policy, stored at the rollout, [N].
        step_weight: the method's factor on each loss, [N]; None weights all by 1.
    """

    steps: tuple[int, ...]
    transitions: tuple[Transition, ...]
    old_means: Tensor
    next_latents: Tensor
    log_prob: Tensor
    step_weight: Tensor | None

    def _selected(self, states: Tensor, members: Tensor) -> dict[str, Any]:
        kept, weight = states.tolist(), self.step_weight
        return super()._selected(states, members) | {
            "steps": tuple(self.steps[i] for i in kept),
            "transitions": tuple(self.transitions[i] for i in kept),
            "old_means": self.old_means[states],
            "next_latents": self.next_latents[members],
            "log_prob": self.log_prob[members],
            "step_weight": None if weight is None else weight[members],
        }

    def loss(self, velocity: Tensor, config: TrainConfig) -> Loss:
        """See :meth:`TrainingBatch.loss`; the penalty is the steps' KL to the base."""
        settings, states = config.optimization, self.states
        objective, state_of = config.objective, self.state_of.to(states.device)
        assert isinstance(objective, TransitionObjective)
        mean = transition_mean(states, velocity, self.transitions)
        std = per_state([law.std for law in self.transitions], states)
        seen = self._seen(mean[state_of], std[state_of], state_of)
        terms = objective.terms(seen, settings.clip_range)
        weighted = terms.loss if self.step_weight is None else terms.loss * self.step_weight
        total, kl = weighted.sum(), None
        if settings.kl_coefficient > 0:
            base_mean = transition_mean(states, self.frozen["base"], self.transitions)
            kl = transition_kl(mean, base_mean, std)[state_of].sum()
            total = total + settings.kl_coefficient * kl
        ratio = torch.exp(seen.log_prob.detach() - self.log_prob)
        return Loss(total * self.weight, terms.clipped, kl, seen.log_prob, ratio)

    def _seen(self, mean: Tensor, std: Tensor, state_of: Tensor) -> Transitions:
        """What the objective sees, given the ``mean`` and ``std`` of each transition."""
        durations = [law.sigma - law.sigma_next for law in self.transitions]
        return Transitions(
            # All steps of a run have the same kernel.
            log_prob=self.transitions[0].log_prob(self.next_latents, mean, std),
            old_log_prob=self.log_prob,
            advantage=self.advantage.to(mean.device),
            next_latents=self.next_latents,
            mean=mean,
            old_mean=self.old_means[state_of],
            std=std,
            duration=per_state(durations, self.log_prob)[state_of].flatten(),
            steps=torch.tensor(self.steps)[self.state_of],
            whole_update=round(1 / self.weight) == len(self),
        )


@dataclass(frozen=True)
class NoisedBatch(TrainingBatch):
    """Clean images, each noised to some times; every state has one loss.

    The images of one group that share a time are next to each other.

    Attributes:
        target: eps - x_0 at each state, [U, ...].
        groups: which states are compared: those of the same group and place in its times, [U].
        group_sums: the sums over them that the loss needs, [U], computed before where a micro-batch
            does not hold whole groups.
    """

    target: Tensor
    groups: Tensor
    group_sums: Tensor | None = None

    def _selected(self, states: Tensor, members: Tensor) -> dict[str, Any]:
        sums = self.group_sums
        return super()._selected(states, members) | {
            "target": self.target[states],
            "groups": self.groups[states],
            "group_sums": None if sums is None else sums[states],
        }

    def loss(self, velocity: Tensor, config: TrainConfig) -> Loss:
        """See :meth:`TrainingBatch.loss`; the penalty is mean (v - v_base)^2."""
        objective, settings = config.objective, config.optimization
        assert isinstance(objective, ForwardObjective)
        terms = objective.terms(self._seen(velocity, config), settings.clip_range)
        total, penalty = terms.loss.sum(), None
        if settings.kl_coefficient > 0:
            penalty = mean_square(velocity - self.frozen["base"]).sum()
            total = total + settings.kl_coefficient * penalty
        return Loss(total * self.weight, terms.clipped, penalty)

    def group_terms(self, velocity: Tensor, config: TrainConfig) -> Tensor:
        """What the loss sums over each group, for each state, [U]."""
        assert isinstance(config.objective, ForwardObjective)
        return config.objective.group_terms(self._seen(velocity, config))

    def _seen(self, velocity: Tensor, config: TrainConfig) -> NoisedImages:
        device, sums = velocity.device, self.group_sums

        def group_sum(values: Tensor) -> Tensor:
            return sums_of_groups(values, self.groups) if sums is None else sums

        return NoisedImages(
            time=self.times.to(velocity.dtype),
            target=self.target,
            velocity=velocity,
            frozen=self.frozen,
            advantage=self.advantage.to(device, velocity.dtype),
            limit=config.advantage.clip,
            group_size=config.rollout.group_size,
            group_sum=group_sum,
        )


def sums_of_groups(values: Tensor, groups: Tensor) -> Tensor:
    """The sum of ``values`` [N] over the same entry of ``groups`` [N], for each of them."""
    kinds, place = groups.to(values.device).unique(return_inverse=True)
    return values.new_zeros(len(kinds)).index_add(0, place, values)[place]


def rollout_advantages(
    rollout: Rollout, config: TrainConfig, rewards: Mapping[str, Tensor] | None = None
) -> TransitionAdvantages:
    """The advantages of what a rollout trains: its transitions, or the images of its groups.

    ``rewards``: [P, groups, G] by name; the rollout's own by default.
    """
    if rewards is None:
        rewards = {name: rollout.group_rewards(name) for name in config.rewards}
    weights = {name: reward.weight for name, reward in config.rewards.items()}
    if isinstance(config.objective, ForwardObjective):
        of_images = {n: values[:, rollout.tree.image_groups] for n, values in rewards.items()}
        return image_advantages(of_images, weights, config.advantage)
    steps = [step.step for step in rollout.recorded]
    return transition_advantages(rewards, weights, rollout.tree.groups, steps, config.advantage)


def training_batch(
    rollout: Rollout,
    prompts: Sequence[Prompt],
    config: TrainConfig,
    advantages: TransitionAdvantages | None = None,
) -> TrainingBatch:
    """What is trained of a rollout of ``prompts``, with its advantages.

    ``advantages``: :func:`rollout_advantages` by default.
    """
    if advantages is None:
        advantages = rollout_advantages(rollout, config)
    if isinstance(config.objective, ForwardObjective):
        return noised_images(rollout, prompts, config, advantages.by_step)
    method, recorded = config.method, [step.step for step in rollout.recorded]
    selected = {
        step: method.selected(config.shape, step, values)
        for step, values in zip(recorded, advantages.by_step, strict=True)
    }

    def trained_steps(place: int, sample: int) -> list[int]:
        key = (prompts[place].id, sample)
        steps = method.trained_steps(recorded, config.seed, rollout.iteration, key)
        masks = ((step, selected[step]) for step in steps)
        return [step for step, mask in masks if mask is None or bool(mask[place, sample])]

    samples = range(config.rollout.group_size)
    trained = [[trained_steps(p, g) for g in samples] for p in range(len(prompts))]
    batch = collect_transitions(rollout.recorded, advantages.by_step, trained, rollout.conditioning)
    weights = method.step_weights([step.transition for step in rollout.recorded])
    if weights is None:
        return batch
    of_step = dict(zip(recorded, weights, strict=True))
    of_state = batch.log_prob.new_tensor([of_step[step] for step in batch.steps])
    return replace(batch, step_weight=of_state[batch.state_of])


def collect_transitions(
    recorded: Sequence[RecordedStep],
    advantages: Sequence[Tensor],
    trained: Sequence[Sequence[Sequence[int]]],
    conditioning: Conditioning,
) -> TransitionBatch:
    """Flattens the recorded steps, of P prompts each, and keeps the trained transitions.

    Args:
        recorded: the rollout's stochastic steps.
        advantages: for each recorded step, [P, G].
        trained: for each prompt and sample, the trained steps.
        conditioning: of the P prompts.
    """
    # One entry for each (step, prompt) with a trained transition.
    rows: list[tuple[RecordedStep, int, list[int], list[int], Tensor]] = []
    for step, advantage in zip(recorded, advantages, strict=True):
        for prompt in range(len(step.sources)):
            kept = [n for n, g in enumerate(step.samples) if step.step in trained[prompt][g]]
            if kept:
                used = sorted({int(step.source_of[n]) for n in kept})
                rows.append((step, prompt, kept, used, advantage))
    state_of: list[int] = []
    states = 0
    for step, _, kept, used, _ in rows:
        state_of += [states + used.index(int(step.source_of[n])) for n in kept]
        states += len(used)
    like = recorded[0].sources
    return TransitionBatch(
        conditioning=conditioning,
        states=torch.cat([step.sources[p, used] for step, p, _, used, _ in rows]),
        times=like.new_tensor(
            [step.time for step, _, _, used, _ in rows for _ in used],
            dtype=torch.promote_types(like.dtype, torch.float32),
        ),
        prompts=torch.tensor([p for _, p, _, used, _ in rows for _ in used]),
        steps=tuple(step.step for step, _, _, used, _ in rows for _ in used),
        transitions=tuple(step.transition for step, _, _, used, _ in rows for _ in used),
        old_means=torch.cat([step.means[p, used] for step, p, _, used, _ in rows]),
        state_of=torch.tensor(state_of),
        samples=torch.tensor([step.samples[n] for step, _, kept, _, _ in rows for n in kept]),
        next_latents=torch.cat([step.next_latents[p, kept] for step, p, kept, _, _ in rows]),
        log_prob=torch.cat([step.log_prob[p, kept] for step, p, kept, _, _ in rows]),
        advantage=torch.cat(
            [value[p, [step.samples[n] for n in kept]] for step, p, kept, _, value in rows]
        ),
        step_weight=None,
        frozen={},
        weight=1.0 / len(state_of),
    )


def noised_images(
    rollout: Rollout,
    prompts: Sequence[Prompt],
    config: TrainConfig,
    advantages: Sequence[Tensor],
) -> NoisedBatch:
    """The images of every group of a rollout, noised to the times of the objective.

    Times and noise are keyed by prompt and sample, so they are the same for any number of ranks.
    ``advantages``: for each of ``image_groups``, [P, G].
    """
    objective, iteration = config.objective, rollout.iteration
    assert isinstance(objective, ForwardObjective)
    rule, column = objective.times, {image: i for i, image in enumerate(rollout.tree.images)}
    groups = [rollout.tree.groups[i] for i in rollout.tree.image_groups]
    steps = rollout.tree.steps
    clean, noise, times, members = [], [], [], []
    for p, prompt in enumerate(prompts):
        for place, group in enumerate(groups):
            drawn = []
            for g in range(len(group.images)):
                keys = {"sample": (prompt.id, place, g), "group": (prompt.id, place)}
                of_image = keys.get(rule.shared, ())
                drawn.append(rule.draw(steps, config.seed, iteration, *of_image))
            for slot in range(rule.number(steps)):
                for g, image in enumerate(group.images):
                    key = (prompt.id, place, slot) + (() if rule.shared_noise else (g,))
                    clean.append(rollout.latents[p, column[image]])
                    noise.append(
                        gaussian(clean[-1].shape, config.seed, "training-noise", iteration, *key)
                    )
                    times.append(rollout.sigmas[drawn[g][slot]])
                    members.append((p, place, slot, g))
    images = torch.stack(clean)
    target = to_device(torch.stack(noise), images.device, images.dtype) - images
    time = per_state(times, images)
    of_prompt, of_group, slots, samples = torch.tensor(members).unbind(1)
    return NoisedBatch(
        conditioning=rollout.conditioning,
        states=images + time * target,
        times=time.flatten().to(torch.promote_types(images.dtype, torch.float32)),
        prompts=of_prompt,
        state_of=torch.arange(len(images)),
        samples=samples,
        advantage=torch.stack(list(advantages))[of_group, of_prompt, samples],
        frozen={},
        weight=1.0 / len(images),
        target=target,
        groups=(of_prompt * len(groups) + of_group) * rule.number(steps) + slots,
    )


def split_updates(
    batch: TrainingBatch, config: OptimizationConfig, group_size: int
) -> list[TrainingBatch]:
    """The optimiser steps of one iteration, in order.

    With ``update_every: iteration`` the loss is the mean over samples, prompts and trained steps;
    with ``timestep`` there is one update per trained step, with the mean over samples and prompts.
    """
    if config.update_every == "timestep":
        assert isinstance(batch, TransitionBatch)
        step_of = torch.tensor(batch.steps)[batch.state_of]
        parts = [step_of == step for step in sorted(set(batch.steps))]
    else:
        chunk = batch.samples // (group_size // config.updates_per_iteration)
        parts = [chunk == index for index in range(config.updates_per_iteration)]
    return [batch] if len(parts) == 1 else [batch.update(torch.nonzero(p).flatten()) for p in parts]
