"""The optimiser steps of one iteration and the loss that they minimise."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.policy import Policy
from g2rpo.training.batch import (
    Loss,
    NoisedBatch,
    TrainingBatch,
    split_updates,
    sums_of_groups,
)
from g2rpo.training.batch_sizes import BatchSizes
from g2rpo.training.collective import of_all_ranks, raise_on_all_ranks
from g2rpo.training.config import TrainConfig
from g2rpo.training.forward import ForwardObjective, FrozenPolicy
from g2rpo.training.old_policy import OldPolicy
from g2rpo.training.weights import TrainedWeights

Batch = TypeVar("Batch", bound=TrainingBatch)
Result = TypeVar("Result")


def loss(policy: Policy, batch: TrainingBatch, config: TrainConfig) -> Loss:
    """The objective of ``batch``, a whole update or a micro-batch of it, under ``policy``."""
    return batch.loss(_velocity(policy, batch), config)


def _velocity(policy: Policy, batch: TrainingBatch) -> Tensor:
    chosen = batch.conditioning.select(batch.prompts.to(batch.states.device))
    return policy.velocity(batch.states, batch.times, chosen)


def _guided(policy: Policy, config: TrainConfig) -> Policy:
    """``policy`` with the guidance of training."""
    return policy.guided(
        config.trained_policy.guidance_scale,
        detach_unconditional=config.guidance.detach_unconditional,
    )


@dataclass
class UpdateStatistics:
    """Measurements of one update on this rank.

    Attributes:
        loss: before the update.
        gradient_norm: before clipping, over all ranks.
        ratio_deviation: largest ``|ratio - 1|``; 0 if there is no ratio.
        clipped: transitions or images limited by the objective.
        transitions: transitions or noised images trained.
        kl: penalty on the distance from the base, summed over them.
        forwards: of the transformer (NFE), also of a frozen policy.
        backwards: of the transformer.
    """

    loss: float = 0.0
    gradient_norm: float = math.nan
    ratio_deviation: float = 0.0
    clipped: int = 0
    transitions: int = 0
    kl: float = 0.0
    forwards: int = 0
    backwards: int = 0

    def add(self, part: TrainingBatch, terms: Loss, policy: Policy) -> None:
        """Adds a micro-batch after its backward under ``policy``."""
        self.loss += float(terms.loss.detach())
        if terms.ratio is not None:
            # A NaN must trip the ratio check, but Python's max() may drop it.
            deviation = (terms.ratio - 1.0).abs().max()
            worst = torch.maximum(deviation, deviation.new_tensor(self.ratio_deviation))
            self.ratio_deviation = float(worst)
        self.clipped += int(terms.clipped.sum())
        self.transitions += len(part)
        self.kl += 0.0 if terms.kl is None else float(terms.kl.detach())
        evaluations = policy.evaluations_per_velocity
        self.forwards += evaluations * len(part.states)
        self.backwards += (1 if policy.detach_unconditional else evaluations) * len(part.states)


class Updater:
    """Turns training batches into optimiser steps, with the guidance of training."""

    def __init__(
        self,
        config: TrainConfig,
        weights: TrainedWeights,
        optimizer: torch.optim.Optimizer,
        sizes: BatchSizes,
        old: OldPolicy | None = None,
    ) -> None:
        self.config, self.weights, self.policy = config, weights, _guided(weights.policy, config)
        self.accelerator, self.optimizer, self.sizes = weights.accelerator, optimizer, sizes
        self.old = old
        # With adapters the base is the transformer without them.
        apart = "base" in config.frozen_policies and config.lora is None
        self._base = _guided(weights.reference(), config) if apart else None

    def with_frozen(self, batch: Batch) -> tuple[Batch, UpdateStatistics]:
        """``batch`` with the velocities of the frozen policies, and what that computed.

        They stay the same for all updates of an iteration, so each state is evaluated once.
        """
        computed, frozen = UpdateStatistics(), {}
        for name in self.config.frozen_policies:
            with self._frozen(name) as policy:
                frozen[name] = self._within_memory(functools.partial(self._evaluate, policy, batch))
            computed.forwards += self.policy.evaluations_per_velocity * len(batch.states)
        return replace(batch, frozen=frozen), computed

    @contextlib.contextmanager
    def _frozen(self, name: FrozenPolicy) -> Iterator[Policy]:
        """A frozen policy, for evaluations within the block."""
        if name == "old":
            assert self.old is not None
            with self.old.in_use():
                yield self.policy
        elif name == "start" or self._base is not None:
            yield self.policy if name == "start" else self._base  # type: ignore[misc]
        else:
            with self.policy.lora_disabled():
                yield self.policy

    def _evaluate(self, policy: Policy, batch: TrainingBatch) -> Tensor:
        """Velocities at the states of ``batch``, without a gradient."""
        with torch.no_grad():
            parts = batch.split(self.sizes.training.states)
            return torch.cat([_velocity(policy, part) for part in parts])

    def run(
        self, batch: TrainingBatch, prompts: Sequence[Prompt], iteration: int
    ) -> list[UpdateStatistics]:
        """Takes all optimiser steps of one iteration.

        Raises:
            UserError: on all ranks, before the weights change, if the ratio before the first update
                is not 1, or a loss or gradient is not finite.
        """
        updates: list[UpdateStatistics] = []
        size = self.config.rollout.group_size
        parts = split_updates(batch, self.config.optimization, size)
        counts = of_all_ranks(self.accelerator, [len(part) for part in parts])
        for part, lengths in zip(parts, zip(*counts, strict=True), strict=True):
            # The mean over all ranks' losses, which may differ in number between ranks.
            update = self.backward(replace(part, weight=len(lengths) / sum(lengths)))
            if not updates:
                found = of_all_ranks(self.accelerator, update.ratio_deviation)
                # NaN if any of them is.
                update.ratio_deviation = float(torch.tensor(found, dtype=torch.float64).max())
                self._check_ratio(update.ratio_deviation, iteration)
            self._step(update, prompts, iteration)
            updates.append(update)
        return updates

    def backward(self, update: TrainingBatch) -> UpdateStatistics:
        """Computes the gradient of ``update``, averaged over ranks; returns this rank's statistics.

        If memory runs out on any rank, all of them start again with smaller micro-batches, and the
        statistics of the failed attempt are dropped.
        """
        statistics = self._within_memory(functools.partial(self._accumulate, update))
        self.weights.reduce_gradients()
        return statistics

    def _within_memory(self, compute: Callable[[], Result]) -> Result:
        """``compute()``, with smaller micro-batches on all ranks if memory runs out on any."""
        while True:
            found: Result | None = None
            with contextlib.suppress(torch.OutOfMemoryError):
                found = compute()
            if self.sizes.share_training(found is not None):
                assert found is not None
                return found
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
        statistics, size = UpdateStatistics(), self.sizes.training.states
        objective = self.config.objective
        if isinstance(objective, ForwardObjective) and objective.compares_groups:
            assert isinstance(update, NoisedBatch)
            group_size = self.config.rollout.group_size
            if size < group_size:
                velocity = self._evaluate(self.policy, update)
                terms_of_groups = update.group_terms(velocity, self.config)
                sums = sums_of_groups(terms_of_groups, update.groups)
                update = replace(update, group_sums=sums)
                statistics.forwards += self.policy.evaluations_per_velocity * len(update)
            else:
                size -= size % group_size
        for part in update.split(size):
            terms = loss(self.policy, part, self.config)
            terms.loss.backward()
            statistics.add(part, terms, self.policy)
        return statistics

    def _check_ratio(self, deviation: float, iteration: int) -> None:
        """Rejects a training forward that differs from the rollout's.

        Before the first update the policy is still that of the rollout, so the ratio is 1 up to
        rounding. If it is not, every later ratio is silently wrong in the same way.
        """
        tolerance = self.config.optimization.ratio_tolerance
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
                    "or, in the first iteration, the weights of the rewards and the settings of "
                    "objective (the last checkpoint is intact)"
                )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.weights.updated()
