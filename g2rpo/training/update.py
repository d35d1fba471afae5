"""The optimiser steps of one iteration."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from g2rpo.data.prompts import Prompt
from g2rpo.flow.schedule import SigmaGrid
from g2rpo.flow.transition import log_prob, per_state, transition_mean
from g2rpo.policy import Conditioning, FluxPolicy
from g2rpo.training.collective import raise_on_all_ranks
from g2rpo.training.config import TrainConfig
from g2rpo.training.engine import TrainedWeights
from g2rpo.training.engine.out_of_memory import MicroBatchSize
from g2rpo.training.objective import clipped_objective, transition_kl
from g2rpo.training.transitions import (
    MicroBatch,
    TrainingBatch,
    Update,
    micro_batches,
    split_updates,
)


@dataclass
class UpdateStatistics:
    """What the updates of one iteration measured on this rank.

    Attributes:
        losses: loss of each update.
        gradient_norms: norm before clipping, of each update.
        ratio_deviation: largest ``|ratio - 1|`` before the first update.
        clipped: transitions whose ratio lay outside of the clip range.
        transitions: transitions trained.
        kl: summed KL to the base over transitions.
        forwards: states that went through a training forward (and, with a KL, the base's).
        backwards: states that went through a backward.
    """

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    ratio_deviation: float = 0.0
    clipped: int = 0
    transitions: int = 0
    kl: float = 0.0
    forwards: int = 0
    backwards: int = 0


class Updater:
    """Turns training batches into optimiser steps.

    Attributes:
        config: the run's configuration.
        weights: the trained weights of ``policy``.
        optimizer: their optimiser.
        size: states per training forward, made smaller where memory runs out.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        weights: TrainedWeights,
        optimizer: torch.optim.Optimizer,
        grid: SigmaGrid,
    ) -> None:
        self.config, self.weights, self.policy = config, weights, weights.policy
        self.accelerator = weights.accelerator
        self.optimizer, self.grid = optimizer, grid
        self.size = MicroBatchSize(config.execution.training_micro_batch, self.accelerator, run)
        self._reference: FluxPolicy | None = None

    def keep_reference(self) -> None:
        """Keeps the current transformer as the frozen base of the KL penalty.

        Under adapters the base is there already: it is the transformer without them.
        """
        if self.config.optimization.kl_coefficient > 0 and self.config.lora is None:
            self._reference = self.weights.reference()

    def run(
        self,
        batch: TrainingBatch,
        conditioning: Conditioning,
        prompts: Sequence[Prompt],
        iteration: int,
    ) -> UpdateStatistics:
        """Takes all optimiser steps of one iteration.

        Raises:
            UserError: the ratio before the first update is not 1, or a loss or gradient is not
                finite. Every rank raises together, before the weights change.
        """
        statistics = UpdateStatistics()
        for index, update in enumerate(split_updates(batch, self.config.optimization)):
            loss = self.backward(batch, update, conditioning, statistics, first=index == 0)
            if index == 0:
                self._check_ratio(statistics, iteration)
            self._step(loss, statistics, prompts, iteration)
        return statistics

    def backward(
        self,
        batch: TrainingBatch,
        update: Update,
        conditioning: Conditioning,
        statistics: UpdateStatistics,
        *,
        first: bool = False,
    ) -> float:
        """The gradient of ``update``, averaged over ranks; returns its loss on this rank.

        Where memory runs out on any rank, all of them do it again from the start in smaller
        micro-batches; what the failed attempt counted is forgotten.
        """
        before = dataclasses.replace(statistics)
        while True:
            loss = math.nan
            with self.size.attempt(self.weights.sharded) as attempt:
                loss = self._accumulate(batch, update, conditioning, statistics, first=first)
            if attempt.succeeded:
                self.weights.reduce_gradients()
                return loss
            self.weights.drop_gradients()
            vars(statistics).update(vars(before))

    def _accumulate(
        self,
        batch: TrainingBatch,
        update: Update,
        conditioning: Conditioning,
        statistics: UpdateStatistics,
        *,
        first: bool,
    ) -> float:
        """Backwards through all micro-batches of ``update``; returns its loss."""
        total = 0.0
        parts = list(micro_batches(batch, update, self.size.states))
        for part in parts:
            loss = self._loss(batch, part, conditioning, statistics, first=first)
            loss = loss * update.weight
            loss.backward()
            total += float(loss.detach())
            statistics.forwards += len(part.states)
            statistics.backwards += len(part.states)
        return total

    def _loss(
        self,
        batch: TrainingBatch,
        part: MicroBatch,
        conditioning: Conditioning,
        statistics: UpdateStatistics,
        *,
        first: bool,
    ) -> Tensor:
        """The summed loss of one micro-batch."""
        device = batch.states.device
        indices = part.states.tolist()
        states = batch.states[part.states]
        laws = [batch.transitions[i] for i in indices]
        precision = torch.promote_types(states.dtype, torch.float32)
        times = states.new_tensor(
            [self.grid.timesteps[batch.steps[i]] for i in indices], dtype=precision
        )
        chosen = conditioning.select(batch.prompts[part.states].to(device))
        state_of = part.state_of.to(device)

        velocity = self.policy.velocity(states, times, chosen)
        mean = transition_mean(states, velocity, laws)
        std = per_state([law.std for law in laws], states)
        value = log_prob(batch.next_latents[part.members], mean[state_of], std[state_of])
        terms = clipped_objective(
            value,
            batch.log_prob[part.members],
            batch.advantage[part.members].to(device),
            self.config.optimization.clip_range,
        )
        if first:
            deviation = (terms.ratio - 1.0).abs().max()
            # A NaN must trip the check, and max() of Python would drop it.
            worst = torch.maximum(deviation, deviation.new_tensor(statistics.ratio_deviation))
            statistics.ratio_deviation = float(worst)
        statistics.clipped += int(terms.clipped.sum())
        statistics.transitions += len(part.members)
        loss = terms.loss.sum()
        if self.config.optimization.kl_coefficient > 0:
            base, without_adapters = self._base()
            with torch.no_grad(), without_adapters:
                reference = base.velocity(states, times, chosen)
            statistics.forwards += len(part.states)
            kl = transition_kl(mean, transition_mean(states, reference, laws), std)[state_of].sum()
            statistics.kl += float(kl.detach())
            loss = loss + self.config.optimization.kl_coefficient * kl
        return loss

    def _base(self) -> tuple[FluxPolicy, contextlib.AbstractContextManager[None]]:
        """The frozen base, and the context in which it is that."""
        if self._reference is not None:
            return self._reference, contextlib.nullcontext()
        return self.policy, self.policy.lora_disabled()

    def _check_ratio(self, statistics: UpdateStatistics, iteration: int) -> None:
        deviation = statistics.ratio_deviation
        tolerance = self.config.optimization.ratio_tolerance
        message = None
        if not deviation <= tolerance:
            message = (
                f"iteration {iteration + 1}: the importance ratio before the first update differs "
                f"from 1 by {deviation:.2e}, more than optimization.ratio_tolerance {tolerance:g}: "
                "the training forward does not repeat the rollout's (dtype, dropout, attention "
                "backend or changed weights)"
            )
        raise_on_all_ranks(self.accelerator, message)

    def _step(
        self,
        loss: float,
        statistics: UpdateStatistics,
        prompts: Sequence[Prompt],
        iteration: int,
    ) -> None:
        """Clips the gradient and takes one optimiser step, if all of it is finite."""
        norm_value = self.weights.clip_gradients(self.config.optimization.max_grad_norm)
        message = None
        if not (math.isfinite(loss) and math.isfinite(norm_value)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            rewards = ", ".join(self.config.rewards)
            texts = ", ".join(repr(prompt.text) for prompt in prompts)
            message = (
                f"iteration {iteration + 1}: the {what} is not finite (loss {loss:g}, gradient "
                f"norm {norm_value:g}) on the prompts {texts} with the rewards {rewards}; lower "
                "optimization.learning_rate; the last checkpoint is intact"
            )
        raise_on_all_ranks(self.accelerator, message)
        statistics.losses.append(loss)
        statistics.gradient_norms.append(norm_value)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.weights.updated()
