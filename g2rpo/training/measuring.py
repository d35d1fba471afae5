"""Measurements of an iteration by which adaptive methods choose later rollouts.

Both use the iteration's own rollout. The sums that they return, and what they decide, are in
:mod:`g2rpo.methods.adaptive`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.distributed.tensor import DTensor

from g2rpo.flow.rollout_tree import recorded_steps
from g2rpo.methods.adaptive import pairs
from g2rpo.training.advantages import group_advantages
from g2rpo.training.batch import TransitionBatch
from g2rpo.training.config import TrainConfig
from g2rpo.training.rollout import Rollout
from g2rpo.training.update import Updater, UpdateStatistics


@dataclass
class GradientMoments:
    """Running sums for the mean and the variance of gradients.

    Attributes:
        total: sum of the gradients, one tensor per parameter.
        squares: sum of their squared norms.
        count: number of gradients.
    """

    total: list[Tensor] = field(default_factory=list)
    squares: float = 0.0
    count: int = 0

    def add(self, gradient: Sequence[Tensor]) -> None:
        """Adds a gradient."""
        self.squares += squared_length(gradient)
        self.count += 1
        if not self.total:
            self.total = [part.detach().clone() for part in gradient]
            return
        for place, part in enumerate(gradient):
            self.total[place] += part

    @property
    def noise(self) -> float:
        """Unbiased estimate of E|g - m|^2."""
        mean_square = squared_length(self.total) / self.count**2
        return max(0.0, (self.squares - self.count * mean_square) / (self.count - 1))

    @property
    def signal(self) -> float:
        """Unbiased estimate of |m|^2; the mean of ``count`` gradients is still noisy."""
        return squared_length(self.total) / self.count**2 - self.noise / self.count


def squared_length(parts: Sequence[Tensor]) -> float:
    """Sum of all squares in float64."""
    total = 0.0
    for part in parts:
        square = part.detach().double().pow(2).sum()
        total += float(square.full_tensor() if isinstance(square, DTensor) else square)
    return total


def measure_gradients(
    updater: Updater, batch: TransitionBatch, prompts: int
) -> tuple[dict[str, float], list[UpdateStatistics]]:
    """The signal and the noise of the gradient of each step in ``batch``.

    The gradients of two halves of the prompts take one backward per state, as training does, and
    their mean and difference estimate the same ratio as the simple noise scale of McCandlish et al.
    (arXiv 1812.06162). Halves, unlike the gradients of single prompts, also exist when gradients
    are sharded over ranks, and are the same for any number of ranks.

    Args:
        updater: computes gradients; the weights do not change.
        batch: this rank's transitions, of an even number of prompts.
        prompts: over all ranks.

    Returns:
        ``signal/<step>`` and ``noise/<step>``, the latter for the gradient of one prompt; and what
        was computed.
    """
    step_of = torch.tensor(batch.steps)[batch.state_of]
    first = batch.prompts[batch.state_of] < len(batch.conditioning) // 2
    sums: dict[str, float] = {}
    computed = []
    for step in sorted(set(batch.steps)):
        moments = GradientMoments()
        for half in (first, ~first):
            members = torch.nonzero((step_of == step) & half).flatten()
            statistics, gradient = updater.gradient(batch.update(members))
            moments.add(gradient)
            computed.append(statistics)
        sums |= {f"signal/{step}": moments.signal, f"noise/{step}": moments.noise * prompts / 2}
    return sums, computed


def measure_agreement(rollout: Rollout, config: TrainConfig) -> dict[str, float]:
    """How similarly the granularities rank the samples of this rank's groups.

    Returns:
        ``agreement/<finer>/<coarser>``, the sum of Spearman's rank correlations over steps and
        prompts, and ``groups/<finer>/<coarser>``, their number. A group with equal rewards has no
        ranking and is left out.
    """
    weights = {name: term.weight for name, term in config.rewards.items()}
    rewards = {name: rollout.group_rewards(name) for name in config.rewards}
    # A ranking needs no other normaliser, and this one needs no other rank's rewards.
    rule = config.advantage.model_copy(update={"normalizer": "group"})
    groups = rollout.tree.groups
    values, _ = group_advantages(rewards, weights, rule, groups)
    ranks = rankdata(values.numpy(), axis=-1)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    lengths = np.sqrt((ranks**2).sum(axis=-1, keepdims=True))
    units = np.divide(ranks, lengths, out=np.zeros_like(ranks), where=lengths > 0)
    place = {(group.step, group.granularity): index for index, group in enumerate(groups)}
    sums: dict[str, float] = {}
    for fine, coarse in pairs([g for g in {group.granularity for group in groups} if g]):
        agreement, counted = 0.0, 0
        for step in recorded_steps(rollout.tree):
            one, other = (units[:, place[step, g]] for g in (fine, coarse))
            agreement += float((one * other).sum())
            counted += int((one.any(axis=-1) & other.any(axis=-1)).sum())
        sums |= {f"agreement/{fine}/{coarse}": agreement, f"groups/{fine}/{coarse}": counted}
    return sums
