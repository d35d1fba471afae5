"""Objectives on recorded transitions: the loss of each, and the KL penalty."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from g2rpo.config import StrictModel
from g2rpo.errors import UserError


@dataclass(frozen=True)
class Transitions:
    """What an objective sees of N transitions from x_k to x_{k+1}.

    Attributes:
        log_prob: under the current policy, [N].
        old_log_prob: under the rollout policy, [N].
        advantage: [N].
        next_latents: x_{k+1}, [N, ...].
        mean: of the step under the current policy, [N, ...].
        old_mean: under the rollout policy, [N, ...].
        std: of the step, broadcastable to [N, ...].
        duration: sigma_k - sigma_{k+1}, [N].
        steps: k of each transition, [N] int64.
        whole_update: whether these are all transitions of an update, not a micro-batch.
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    next_latents: Tensor
    mean: Tensor
    old_mean: Tensor
    std: Tensor
    duration: Tensor
    steps: Tensor
    whole_update: bool = True

    @property
    def divergence(self) -> Tensor:
        """KL of the step from the rollout's: mean of (mu - mu_old)^2 / (2 std^2), [N]."""
        return transition_kl(self.mean, self.old_mean, self.std)


@dataclass(frozen=True)
class ObjectiveTerms:
    """An objective's terms for each of N transitions or noised images.

    Attributes:
        loss: [N].
        clipped: whether the objective limits it, [N] bool.
    """

    loss: Tensor
    clipped: Tensor


class TransitionObjective(StrictModel):
    """Base class of objectives on transitions; its fields are the objective's configuration."""

    name: str

    def check_micro_batch(self, states: int, held: int) -> None:
        """Rejects a micro-batch of ``held`` states for updates of up to ``states`` states.

        Raises:
            UserError: the objective needs a whole update at once.
        """

    def terms(self, transitions: Transitions, clip_range: float) -> ObjectiveTerms:
        """The loss of each transition; ``clip_range`` is that of the optimization."""
        raise NotImplementedError


class Clipped(TransitionObjective):
    """PPO's clipped surrogate of the importance ratio."""

    name: Literal["clipped"] = "clipped"

    def terms(self, transitions: Transitions, clip_range: float) -> ObjectiveTerms:
        """See :func:`clipped_ratio`."""
        log_ratio = transitions.log_prob - transitions.old_log_prob
        return clipped_ratio(log_ratio, transitions.advantage, clip_range)


class Guard(TransitionObjective):
    """GRPO-Guard: the clipped surrogate of a ratio with equal mean and spread at every step.

    The ratio is exp(std (log_prob - old_log_prob + b)) with b = :attr:`Transitions.divergence`,
    which equals exp(mean of z (mu - mu_old)) with z the step's noise; the loss is divided by the
    step's duration (arXiv 2510.22319, RatioNorm). For a Gaussian log-prob both forms are the same;
    for ``cps``, whose log-prob leaves out the std, only the second one is meant.
    """

    name: Literal["guard"] = "guard"
    published: Literal["pref_grpo", "flow_factory", "verl_omni", "flow_grpo"] = "pref_grpo"
    """The code that is followed. ``pref_grpo``: as above. ``verl_omni``: divides by the batch's
    squared mean of sqrt(duration), the same for the transitions of one step. ``flow_factory``: does
    not divide. ``flow_grpo``: as ``verl_omni``, with b averaged over all transitions of the step in
    an update, which must be one micro-batch."""

    def check_micro_batch(self, states: int, held: int) -> None:
        """See :meth:`TransitionObjective.check_micro_batch`: ``flow_grpo`` averages over it."""
        if self.published == "flow_grpo" and states > held:
            raise UserError(
                f"objective.published=flow_grpo averages over the {states} states of an update "
                f"on a rank, but execution.training_micro_batch={held}; raise it to {states}, "
                "or use objective.published=verl_omni, which needs no whole update"
            )

    def terms(self, transitions: Transitions, clip_range: float) -> ObjectiveTerms:
        """See the class.

        Raises:
            UserError: ``flow_grpo`` in a micro-batch.
        """
        t = transitions
        noise = (t.next_latents.detach() - t.old_mean) / t.std
        exponent = (noise * (t.mean - t.old_mean)).flatten(1).mean(dim=1)
        if self.published == "flow_grpo":
            if not t.whole_update:
                raise UserError(
                    "objective.published=flow_grpo averages over an update; raise "
                    "execution.training_micro_batch until it holds all of its states"
                )
            bias = t.divergence
            exponent = exponent + t.std.flatten() * (_mean_of_step(bias, t.steps) - bias)
        terms = clipped_ratio(exponent, t.advantage, clip_range)
        loss = terms.loss if self.published == "flow_factory" else terms.loss / t.duration
        return ObjectiveTerms(loss, terms.clipped)


class DPPO(TransitionObjective):
    """Flow-DPPO: no clip; a transition beyond a divergence is dropped if its step would go further.

    The loss is 0 if the divergence from the rollout's step is at least the threshold and the ratio
    has already moved the way that the advantage pushes it, else -A ratio (arXiv 2606.11025).
    """

    name: Literal["dppo"] = "dppo"
    threshold: float = Field(1e-5, gt=0)
    """Largest divergence, mean over the latent dimensions."""

    def terms(self, transitions: Transitions, clip_range: float) -> ObjectiveTerms:
        """See the class; ``clip_range`` is not used."""
        change = transitions.log_prob - transitions.old_log_prob
        advantage = transitions.advantage.to(change.dtype)
        moved = torch.exp(change.detach())
        further = ((moved > 1) & (advantage > 0)) | ((moved < 1) & (advantage < 0))
        dropped = (transitions.divergence.detach() >= self.threshold) & further
        # Masked before the exponential: where it overflows, the gradient of inf * 0 is NaN.
        ratio = torch.exp(change.masked_fill(dropped, 0.0))
        return ObjectiveTerms((-advantage * ratio).masked_fill(dropped, 0.0), dropped)


def clipped_ratio(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> ObjectiveTerms:
    """PPO's clipped surrogate, max(-A rho, -A clip(rho, 1 +- c)).

    Args:
        log_ratio: log rho, [N].
        advantage: A, [N].
        clip_range: c (released flag ``--clip_range 1e-4``).
    """
    lowest, highest = 1.0 - clip_range, 1.0 + clip_range
    advantage = advantage.to(log_ratio.dtype)
    found = torch.exp(log_ratio.detach())
    limited = found.clamp(lowest, highest)
    further = torch.where(advantage > 0, found > limited, found < limited)
    constant = torch.where(advantage == 0, ~found.isnan(), further)
    # Masked before the exponential: where it overflows, the gradient of inf * 0 is NaN.
    ratio = torch.exp(log_ratio.masked_fill(constant, 0.0))
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(lowest, highest))
    loss = torch.where(constant, -advantage * limited, loss)
    return ObjectiveTerms(loss, (found - 1.0).abs() > clip_range)


def transition_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """KL of two Gaussian steps with one std: mean over dimensions of (mu - mu_ref)^2 / (2 std^2).

    Args:
        mean: of the policy, [N, ...].
        reference_mean: of the frozen base or the rollout's policy, [N, ...].
        std: broadcastable; g sqrt(-Delta) (the released Flow-GRPO omits Delta: docs/fidelity.md).
    """
    return ((mean - reference_mean) ** 2 / (2 * std**2)).flatten(1).mean(dim=1)


def _mean_of_step(values: Tensor, steps: Tensor) -> Tensor:
    """The mean of ``values`` [N] over the transitions of the same step, for each of them."""
    kinds, place = steps.to(values.device).unique(return_inverse=True)
    means: Tensor = values.new_zeros(len(kinds)).index_add(0, place, values) / place.bincount()
    return means[place]
