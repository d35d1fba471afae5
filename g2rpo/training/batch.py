"""Training data: the stochastic transitions of a rollout with their advantages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.flow.sweep import RecordedStep
from g2rpo.flow.transition import Transition
from g2rpo.policy import Conditioning
from g2rpo.training.advantages import TransitionAdvantages, transition_advantages
from g2rpo.training.config import OptimizationConfig, TrainConfig
from g2rpo.training.rollout import Rollout


@dataclass(frozen=True)
class TrainingBatch:
    """N trained transitions from U distinct states.

    Samples that share a state (all of a G2RPO group share x_k) share its training forward.

    Attributes:
        conditioning: of the P prompts.
        states: the states x_k, [U, ...].
        times: the model's time at each state, [U].
        prompts: prompt index of each state, [U] int64.
        steps: grid step of each state, length U.
        transitions: the law of each state's transition, length U.
        old_means: the mean of each state's step under the rollout policy, [U, ...].
        state_of: the source state of each transition, [N] int64.
        samples: sample index of each transition, [N] int64.
        next_latents: x_{k+1}, [N, ...].
        log_prob: under the rollout policy, stored at the rollout, [N].
        advantage: [N] float64.
        step_weight: the method's factor on each loss, [N]; None weights all by 1.
        weight: of each transition in the loss, which is the mean over its update.
    """

    conditioning: Conditioning
    states: Tensor
    times: Tensor
    prompts: Tensor
    steps: tuple[int, ...]
    transitions: tuple[Transition, ...]
    old_means: Tensor
    state_of: Tensor
    samples: Tensor
    next_latents: Tensor
    log_prob: Tensor
    advantage: Tensor
    step_weight: Tensor | None
    weight: float

    def __len__(self) -> int:
        return len(self.state_of)

    def update(self, members: Tensor) -> "TrainingBatch":
        """The update over the transitions ``members`` only."""
        part = self._part(torch.unique(self.state_of[members]), members)
        return replace(part, weight=1.0 / len(members))

    def split(self, size: int) -> Iterator["TrainingBatch"]:
        """Micro-batches of at most ``size`` states, with all their transitions."""
        for states in torch.split(torch.arange(len(self.states)), size):
            yield self._part(states, torch.nonzero(torch.isin(self.state_of, states)).flatten())

    def _part(self, states: Tensor, members: Tensor) -> "TrainingBatch":
        kept = states.tolist()
        return replace(
            self,
            states=self.states[states],
            times=self.times[states],
            prompts=self.prompts[states],
            steps=tuple(self.steps[i] for i in kept),
            transitions=tuple(self.transitions[i] for i in kept),
            old_means=self.old_means[states],
            state_of=torch.searchsorted(states, self.state_of[members]),
            samples=self.samples[members],
            next_latents=self.next_latents[members],
            log_prob=self.log_prob[members],
            advantage=self.advantage[members],
            step_weight=None if self.step_weight is None else self.step_weight[members],
        )


def rollout_advantages(
    rollout: Rollout, config: TrainConfig, rewards: Mapping[str, Tensor] | None = None
) -> TransitionAdvantages:
    """The advantages of a rollout's transitions.

    Args:
        rollout: the rollout, whose groups credit steps.
        config: reward weights, normalisation and combination.
        rewards: [P, groups, G] by name; the rollout's own by default.
    """
    if rewards is None:
        rewards = {name: rollout.group_rewards(name) for name in config.rewards}
    weights = {name: reward.weight for name, reward in config.rewards.items()}
    steps = [step.step for step in rollout.recorded]
    return transition_advantages(rewards, weights, rollout.tree.groups, steps, config.advantage)


def training_batch(
    rollout: Rollout,
    prompts: Sequence[Prompt],
    config: TrainConfig,
    advantages: TransitionAdvantages | None = None,
) -> TrainingBatch:
    """The transitions of a rollout that are trained, with their advantages.

    Args:
        rollout: of ``prompts``.
        prompts: P prompts.
        config: chooses the trained steps and how advantages are combined.
        advantages: by step, [P, G]; :func:`rollout_advantages` by default.
    """
    if advantages is None:
        advantages = rollout_advantages(rollout, config)
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
) -> TrainingBatch:
    """Flattens the recorded steps and keeps the trained transitions.

    Args:
        recorded: the rollout's stochastic steps, with P prompts and N transitions each.
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
    return TrainingBatch(
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
        weight=1.0 / len(state_of),
    )


def split_updates(
    batch: TrainingBatch, config: OptimizationConfig, group_size: int
) -> list[TrainingBatch]:
    """The optimiser steps of one iteration, in order.

    With ``update_every: iteration`` the loss is the mean over samples, prompts and trained steps;
    with ``timestep`` there is one update per trained step, with the mean over samples and prompts.

    Raises:
        UserError: an update has nothing to train.
    """
    if config.update_every == "timestep":
        step_of = torch.tensor(batch.steps)[batch.state_of]
        parts = [step_of == step for step in sorted(set(batch.steps))]
    else:
        chunk = batch.samples // (group_size // config.updates_per_iteration)
        parts = [chunk == index for index in range(config.updates_per_iteration)]
    if not all(bool(part.any()) for part in parts):
        raise UserError(
            f"optimization.updates_per_iteration={config.updates_per_iteration}: an update has no "
            "transition to train; use fewer or prune less"
        )
    return [batch] if len(parts) == 1 else [batch.update(torch.nonzero(p).flatten()) for p in parts]
