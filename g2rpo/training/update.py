"""The optimiser steps of one iteration and the loss that they minimise."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.flow.transition import per_state, transition_mean
from g2rpo.policy import FluxPolicy
from g2rpo.training.batch import TrainingBatch, split_updates
from g2rpo.training.batch_sizes import BatchSizes
from g2rpo.training.collective import raise_on_all_ranks
from g2rpo.training.config import TrainConfig
from g2rpo.training.objective import Transitions, transition_kl
from g2rpo.training.weights import TrainedWeights


@dataclass(frozen=True)
class Loss:
    """The loss of a batch and its terms.

    Attributes:
        loss: the sum over the batch's transitions, times its weight: the mean for a whole update.
        log_prob: of each transition under the policy, [N].
        ratio: exp(log_prob - log_prob at the rollout), [N].
        clipped: whether the objective limits the transition, [N] bool.
        kl: KL to the base, summed over transitions; None without a KL penalty.
    """

    loss: Tensor
    log_prob: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor | None


def loss(
    policy: FluxPolicy,
    batch: TrainingBatch,
    config: TrainConfig,
    reference: FluxPolicy | None = None,
) -> Loss:
    """The objective of ``batch`` under ``policy``, with the KL penalty if configured.

    Args:
        policy: the trained policy.
        batch: a whole update or a micro-batch of it.
        config: objective, clip range and weight of the KL.
        reference: the frozen base; by default the policy without its adapters.
    """
    settings, states = config.optimization, batch.states
    state_of = batch.state_of.to(states.device)
    chosen = batch.conditioning.select(batch.prompts.to(states.device))

    velocity = policy.velocity(states, batch.times, chosen)
    mean = transition_mean(states, velocity, batch.transitions)
    std = per_state([law.std for law in batch.transitions], states)
    transitions = _transitions(batch, mean, std, state_of)
    value = transitions.log_prob
    terms = config.objective.terms(transitions, settings.clip_range)
    weighted = terms.loss if batch.step_weight is None else terms.loss * batch.step_weight
    total, kl = weighted.sum(), None
    if settings.kl_coefficient > 0:
        base = policy if reference is None else reference
        frozen = policy.lora_disabled() if reference is None else contextlib.nullcontext()
        with torch.no_grad(), frozen:
            base_mean = transition_mean(
                states, base.velocity(states, batch.times, chosen), batch.transitions
            )
        kl = transition_kl(mean, base_mean, std)[state_of].sum()
        total = total + settings.kl_coefficient * kl
    ratio = torch.exp(value.detach() - batch.log_prob)
    return Loss(total * batch.weight, value, ratio, terms.clipped, kl)


def _transitions(batch: TrainingBatch, mean: Tensor, std: Tensor, state_of: Tensor) -> Transitions:
    """What the objective sees of ``batch``, whose states' steps have ``mean`` and ``std``."""
    after, mean, std = batch.next_latents, mean[state_of], std[state_of]
    durations = [law.sigma - law.sigma_next for law in batch.transitions]
    return Transitions(
        # All steps of a run have the same kernel.
        log_prob=batch.transitions[0].log_prob(after, mean, std),
        old_log_prob=batch.log_prob,
        advantage=batch.advantage.to(mean.device),
        next_latents=after,
        mean=mean,
        old_mean=batch.old_means[state_of],
        std=std,
        duration=per_state(durations, batch.log_prob)[state_of].flatten(),
        steps=torch.tensor(batch.steps)[batch.state_of],
        whole_update=round(1 / batch.weight) == len(batch),
    )


@dataclass
class UpdateStatistics:
    """Measurements of one update on this rank.

    Attributes:
        loss: before the update.
        gradient_norm: before clipping, over all ranks.
        ratio_deviation: largest ``|ratio - 1|``.
        clipped: transitions limited by the objective.
        transitions: transitions trained.
        kl: KL to the base, summed over transitions.
        forwards: states that went through a training forward (and, with a KL, the base's).
        backwards: states that went through a backward.
    """

    loss: float = 0.0
    gradient_norm: float = math.nan
    ratio_deviation: float = 0.0
    clipped: int = 0
    transitions: int = 0
    kl: float = 0.0
    forwards: int = 0
    backwards: int = 0

    def add(self, part: TrainingBatch, terms: Loss) -> None:
        """Adds a micro-batch after its backward."""
        self.loss += float(terms.loss.detach())
        # A NaN must trip the ratio check, but Python's max() may drop it.
        deviation = (terms.ratio - 1.0).abs().max()
        worst = torch.maximum(deviation, deviation.new_tensor(self.ratio_deviation))
        self.ratio_deviation = float(worst)
        self.clipped += int(terms.clipped.sum())
        self.transitions += len(part)
        self.kl += 0.0 if terms.kl is None else float(terms.kl.detach())
        self.forwards += len(part.states) * (1 if terms.kl is None else 2)
        self.backwards += len(part.states)


class Updater:
    """Turns training batches into optimiser steps.

    Attributes:
        config: the run's configuration.
        weights: the trained weights.
        optimizer: their optimiser.
        sizes: states per training forward, halved when memory runs out.
    """

    def __init__(
        self,
        config: TrainConfig,
        weights: TrainedWeights,
        optimizer: torch.optim.Optimizer,
        sizes: BatchSizes,
    ) -> None:
        self.config, self.weights, self.policy = config, weights, weights.policy
        self.accelerator, self.optimizer, self.sizes = weights.accelerator, optimizer, sizes
        # With adapters the base is the transformer without them.
        penalised = config.optimization.kl_coefficient > 0
        self._reference = weights.reference() if penalised and config.lora is None else None

    def run(
        self, batch: TrainingBatch, prompts: Sequence[Prompt], iteration: int
    ) -> list[UpdateStatistics]:
        """Takes all optimiser steps of one iteration.

        Raises:
            UserError: on all ranks, before the weights change, if the ratio before the first update
                is not 1, a loss or gradient is not finite, or an update has nothing to train.
        """
        updates: list[UpdateStatistics] = []
        with raise_on_all_ranks(self.accelerator):
            size = self.config.rollout.group_size
            parts = split_updates(batch, self.config.optimization, size)
        for part in parts:
            update = self.backward(part)
            if not updates:
                self._check_ratio(update.ratio_deviation, iteration)
            self._step(update, prompts, iteration)
            updates.append(update)
        return updates

    def backward(self, update: TrainingBatch) -> UpdateStatistics:
        """Computes the gradient of ``update``, averaged over ranks; returns this rank's statistics.

        If memory runs out on any rank, all of them start again with smaller micro-batches, and the
        statistics of the failed attempt are dropped.
        """
        while True:
            statistics: UpdateStatistics | None = None
            with contextlib.suppress(torch.OutOfMemoryError):
                statistics = self._accumulate(update)
            if self.sizes.share_training(statistics is not None):
                assert statistics is not None
                self.weights.reduce_gradients()
                return statistics
            self.weights.drop_gradients()

    def gradient(self, update: TrainingBatch) -> tuple[UpdateStatistics, list[Tensor]]:
        """What :meth:`backward` returns, and a copy of the gradient, which is then dropped."""
        statistics = self.backward(update)
        gradient = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for parameter in self.weights.parameters
        ]
        self.weights.drop_gradients()
        return statistics, gradient

    def _accumulate(self, update: TrainingBatch) -> UpdateStatistics:
        """Runs forward and backward over all micro-batches of ``update``."""
        statistics = UpdateStatistics()
        for part in update.split(self.sizes.training.states):
            terms = loss(self.policy, part, self.config, self._reference)
            terms.loss.backward()
            statistics.add(part, terms)
        return statistics

    def _check_ratio(self, deviation: float, iteration: int) -> None:
        """Rejects a training forward that differs from the rollout's.

        Before the first update the policy is still that of the rollout, so the ratio is 1 up to
        rounding. If it is not, every later ratio is silently wrong in the same way.
        """
        tolerance = self.config.optimization.ratio_tolerance
        with raise_on_all_ranks(self.accelerator):
            if not deviation <= tolerance:
                raise UserError(
                    f"iteration {iteration + 1}: the importance ratio before the first update "
                    f"differs from 1 by {deviation:.2e}, more than optimization.ratio_tolerance="
                    f"{tolerance:g}; the training forward does not match the rollout's (check "
                    "dtype, dropout, attention backend and changed weights)"
                )

    def _step(self, update: UpdateStatistics, prompts: Sequence[Prompt], iteration: int) -> None:
        """Clips the gradient and takes one optimiser step if both loss and gradient are finite."""
        update.gradient_norm = self.weights.clip_gradients(self.config.optimization.max_grad_norm)
        with raise_on_all_ranks(self.accelerator):
            if not (math.isfinite(update.loss) and math.isfinite(update.gradient_norm)):
                what = "gradient" if math.isfinite(update.loss) else "loss"
                texts = ", ".join(repr(prompt.text) for prompt in prompts)
                raise UserError(
                    f"iteration {iteration + 1}: the {what} is not finite (loss {update.loss:g}, "
                    f"gradient norm {update.gradient_norm:g}) for the prompts {texts} and the "
                    f"rewards {', '.join(self.config.rewards)}; lower optimization.learning_rate "
                    "(the last checkpoint is intact)"
                )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.weights.updated()
