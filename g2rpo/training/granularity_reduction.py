"""How the granularities of a stochastic step become one advantage.

The paper sums the normalised advantages (arXiv 2510.01982, multi-granularity advantage
integration). The other rules are alternatives to compare it with: two weight the granularities'
advantages, two reduce the rewards before they are normalised, once.
"""

from collections.abc import Sequence
from typing import Literal

import torch

GranularityReduction = Literal["sum", "mean", "inverse_variance", "best_of", "reward_mean"]
"""``sum``: of the granularities' advantages (the paper). ``mean``: their mean, the sum without its
larger scale. ``inverse_variance``: their sum, each weighted by the inverse variance of its rewards
in the group; the weights of a step sum to the number of its granularities, so that equal variances
are ``sum``. ``best_of``: each sample's best reward over the granularities, then normalised.
``reward_mean``: each sample's mean reward over them, then normalised."""


def reduced_rewards(
    rewards: torch.Tensor,
    steps: Sequence[int | None],
    reduction: Literal["best_of", "reward_mean"],
) -> torch.Tensor:
    """One group for each step, in float64.

    Args:
        rewards: [P, number of groups, G].
        steps: the step that each group credits.
        reduction: the rule.

    Returns:
        [P, number of different steps, G], in the order in which the steps come first.
    """
    values = rewards.to(torch.float64)
    reduced = []
    for step in dict.fromkeys(steps):
        part = values[:, _places(steps, step)]
        reduced.append(part.amax(dim=1) if reduction == "best_of" else part.mean(dim=1))
    return torch.stack(reduced, dim=1)


def granularity_weights(
    rewards: torch.Tensor,
    steps: Sequence[int | None],
    reduction: Literal["mean", "inverse_variance"],
    ddof: int,
    equal: torch.Tensor,
) -> torch.Tensor:
    """What each group's advantages are multiplied with before those of a step are summed.

    Args:
        rewards: [P, number of groups, G].
        steps: the step that each group credits.
        reduction: the rule.
        ddof: delta degrees of freedom of the variance.
        equal: [P, number of groups], groups whose rewards are equal: they tell nothing and get
            no weight.

    Returns:
        [P, number of groups, 1] float64.
    """
    values = rewards.to(torch.float64)
    variance = values.var(dim=-1, correction=ddof)
    precision = torch.where(equal, torch.zeros_like(variance), 1.0 / variance)
    weights = torch.ones_like(variance)
    for step in dict.fromkeys(steps):
        places = _places(steps, step)
        if reduction == "mean":
            weights[:, places] = 1.0 / len(places)
            continue
        part = precision[:, places]
        total = part.sum(dim=1, keepdim=True)
        share = part / torch.where(total > 0, total, torch.ones_like(total))
        weights[:, places] = share * len(places)
    return weights[..., None]


def _places(steps: Sequence[int | None], step: int | None) -> list[int]:
    return [place for place, other in enumerate(steps) if other == step]
