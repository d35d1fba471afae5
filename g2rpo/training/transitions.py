"""Stochastic transitions as training data: flattened, weighted, split into updates and batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from g2rpo.flow.sweep import RecordedStep
from g2rpo.flow.transition import Transition
from g2rpo.training.config import OptimizationConfig


@dataclass(frozen=True)
class TrainingBatch:
    """N trained transitions that leave U distinct states.

    Samples that share a state (all of a G2RPO group share x_k) share its training forward.

    Attributes:
        states: the states x_k, [U, ...].
        prompts: prompt index of each state, [U] int64.
        steps: grid step of each state, length U.
        transitions: the law of each state's transition, length U.
        state_of: which state each transition leaves, [N] int64.
        samples: sample index of each transition, [N] int64.
        next_latents: x_{k+1}, [N, ...].
        log_prob: under the rollout policy, as stored at the rollout, [N].
        advantage: [N] float64.
    """

    states: Tensor
    prompts: Tensor
    steps: tuple[int, ...]
    transitions: tuple[Transition, ...]
    state_of: Tensor
    samples: Tensor
    next_latents: Tensor
    log_prob: Tensor
    advantage: Tensor

    def __len__(self) -> int:
        return len(self.state_of)


@dataclass(frozen=True)
class Update:
    """One optimiser step: which transitions it sums over, and the weight of each."""

    members: Tensor
    weight: float


@dataclass(frozen=True)
class MicroBatch:
    """The states of one training forward and the transitions that leave them.

    Attributes:
        states: indices into the training batch's states, [u].
        members: indices into its transitions, [n].
        state_of: for each member, its position within ``states``, [n].
    """

    states: Tensor
    members: Tensor
    state_of: Tensor


def collect_transitions(
    recorded: Sequence[RecordedStep],
    advantages: Sequence[Tensor],
    trained: Sequence[Sequence[Sequence[int]]],
) -> TrainingBatch:
    """Flattens the recorded steps, keeping the transitions that are trained.

    Args:
        recorded: the rollout's stochastic steps, with P prompts and N transitions each.
        advantages: for each recorded step, [P, G].
        trained: for each prompt and sample, the steps that are trained.
    """
    states: list[Tensor] = []
    prompts: list[int] = []
    steps: list[int] = []
    laws: list[Transition] = []
    state_of: list[int] = []
    samples: list[int] = []
    next_latents: list[Tensor] = []
    log_prob: list[Tensor] = []
    advantage: list[Tensor] = []
    for step, value in zip(recorded, advantages, strict=True):
        for prompt in range(len(step.sources)):
            kept = [
                place
                for place, sample in enumerate(step.samples)
                if step.step in trained[prompt][sample]
            ]
            if not kept:
                continue
            used = sorted({int(step.source_of[place]) for place in kept})
            row = {source: len(steps) + i for i, source in enumerate(used)}
            states.append(step.sources[prompt, used])
            prompts += [prompt] * len(used)
            steps += [step.step] * len(used)
            laws += [step.transition] * len(used)
            state_of += [row[int(step.source_of[place])] for place in kept]
            chosen = [step.samples[place] for place in kept]
            samples += chosen
            next_latents.append(step.next_latents[prompt, kept])
            log_prob.append(step.log_prob[prompt, kept])
            advantage.append(value[prompt, chosen])
    return TrainingBatch(
        states=torch.cat(states),
        prompts=torch.tensor(prompts),
        steps=tuple(steps),
        transitions=tuple(laws),
        state_of=torch.tensor(state_of),
        samples=torch.tensor(samples),
        next_latents=torch.cat(next_latents),
        log_prob=torch.cat(log_prob),
        advantage=torch.cat(advantage),
    )


def split_updates(batch: TrainingBatch, config: OptimizationConfig) -> list[Update]:
    """The optimiser steps of one iteration, in order.

    ``iteration`` averages over samples, prompts and trained steps; ``timestep`` makes one
    update per trained step and averages over samples and prompts alone.
    """
    everything = torch.arange(len(batch))
    if config.update_every == "timestep":
        step_of = torch.tensor(batch.steps)[batch.state_of]
        parts = [everything[step_of == step] for step in sorted(set(batch.steps))]
    else:
        group_size = int(batch.samples.max()) + 1
        chunk = batch.samples // (group_size // config.updates_per_iteration)
        parts = [everything[chunk == index] for index in range(config.updates_per_iteration)]
    return [Update(members, 1.0 / len(members)) for members in parts]


def micro_batches(batch: TrainingBatch, update: Update, size: int) -> Iterator[MicroBatch]:
    """Splits an update into forwards of at most ``size`` states."""
    state_of = batch.state_of[update.members]
    states = torch.unique(state_of)
    for chunk in torch.split(states, size):
        inside = torch.isin(state_of, chunk)
        yield MicroBatch(
            states=chunk,
            members=update.members[inside],
            state_of=torch.searchsorted(chunk, state_of[inside]),
        )
