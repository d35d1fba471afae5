"""The clipped objective and the optional KL penalty, per stochastic transition."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ObjectiveTerms:
    """Per-transition terms of the objective.

    Attributes:
        loss: max(-A rho, -A clip(rho)) [N].
        ratio: rho = exp(log_prob - old_log_prob) [N].
        clipped: whether the ratio is outside the clip range [N] bool.
    """

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor


def clipped_objective(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantage: torch.Tensor,
    clip_range: float,
) -> ObjectiveTerms:
    """PPO's clipped surrogate, as a loss.

    Args:
        log_prob: under the current policy, [N].
        old_log_prob: under the rollout policy, [N].
        advantage: [N].
        clip_range: c (released flag ``--clip_range 1e-4``).
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped_ratio = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    advantage = advantage.to(ratio.dtype)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped_ratio)
    return ObjectiveTerms(loss, ratio.detach(), (ratio.detach() - 1.0).abs() > clip_range)


def transition_kl(
    mean: torch.Tensor, reference_mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """KL of two Gaussian steps with one std: mean over dimensions of (mu - mu_ref)^2 / (2 std^2).

    Args:
        mean: of the policy, [N, ...].
        reference_mean: of the frozen base, [N, ...].
        std: broadcastable; g sqrt(-Delta) (the released Flow-GRPO omits Delta: docs/fidelity.md).
    """
    return ((mean - reference_mean) ** 2 / (2 * std**2)).flatten(1).mean(dim=1)
