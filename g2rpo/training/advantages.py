"""Advantages of stochastic transitions, from the rewards of their groups' images.

The paper sums the normalised advantages of a step's granularities (arXiv 2510.01982,
multi-granularity advantage integration). The other reductions are alternatives to compare it with:
two weight the granularities' advantages, two reduce the rewards before normalising once.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from g2rpo.config import StrictModel, unhashed
from g2rpo.flow.rollout_tree import Group

GranularityReduction = Literal["sum", "mean", "inverse_variance", "best_of", "reward_mean"]
"""``sum`` or ``mean`` of the granularities' advantages (the paper: ``sum``).
``inverse_variance``: their sum, each weighted by the inverse variance of its rewards in the group;
the weights of a step sum to the number of its granularities, so equal variances give ``sum``.
``best_of``: each sample's best reward over the granularities, then normalised.
``reward_mean``: each sample's mean reward over them, then normalised."""

# Rewards are float32: a spread of a few rounding errors is not a difference between images.
EQUAL_REWARDS_TOLERANCE = 8 * torch.finfo(torch.float32).eps


class AdvantageConfig(StrictModel):
    """How rewards become advantages."""

    normalizer: Literal["group", "global_std"] = "group"
    """``group``: mean and std of the group. ``global_std``: the group's mean, and the std over all
    samples of the batch (Flow-GRPO's released ``global_std``)."""
    ddof: int = Field(1, ge=0, le=1)
    """Delta degrees of freedom of the std (torch's default 1; Flow-GRPO's numpy 0)."""
    epsilon: float = Field(1e-8, ge=0)
    """Added to the std."""
    clip: float = Field(5.0, gt=0)
    """The summed advantage is clamped to +- this (released flag ``--adv_clip_max 5``)."""
    combination: Literal["sum", "normalized_weights", "sum_of_rewards", "mean_of_ranks"] = "sum"
    """``sum``: weighted sum of each reward's advantages (G2RPO, DanceGRPO). ``normalized_weights``:
    the same with weights that sum to 1 (MixGRPO). ``sum_of_rewards``: rewards are summed before
    they are normalised (Flow-GRPO). ``mean_of_ranks``: the same with each reward's ranks in its
    group, so that no reward's scale or outliers count."""
    granularity_reduction: GranularityReduction = unhashed("sum")
    """How the advantages of a step's granularities are combined; the paper uses ``sum``."""
    trimmed_ratio: float = unhashed(0.0, ge=0, lt=1)
    """This share of a group's rewards, its lowest, does not count in its mean and std (MixGRPO's
    ``trimmed_ratio``); their advantages are normalised with the others'."""
    whiten: bool = unhashed(False)
    """Normalises each step's advantages once more, over all samples of the batch, before they are
    clamped (GDPO, arXiv 2601.05242; its ``epsilon`` is 1e-4)."""

    @model_validator(mode="after")
    def _trims_groups(self) -> Self:
        if self.trimmed_ratio and self.normalizer == "global_std":
            raise ValueError("advantage.trimmed_ratio needs advantage.normalizer: group")
        return self

    @property
    def beyond_groups(self) -> bool:
        """Whether an advantage depends on the rewards of other groups."""
        return self.whiten or self.normalizer == "global_std"

    def trimmed(self, size: int) -> int:
        """How many of a group's ``size`` rewards do not count in its statistics."""
        return int(size * self.trimmed_ratio)


def normalize(
    rewards: torch.Tensor,
    config: AdvantageConfig,
    magnitude: torch.Tensor | None = None,
    present: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(r - mean) / (std + epsilon) over the last dimension.

    Args:
        rewards: [..., G]; ``global_std`` takes the std over all of them.
        config: normaliser, ddof and epsilon.
        magnitude: [..., G], the magnitude at which the rewards were rounded: their own by default,
            larger if they are sums whose terms may cancel.
        present: [..., G] bool, which rewards count in groups of unequal size, without trimming. The
            others may have any value and get advantage 0, as does a group of one.

    Returns:
        The advantages [..., G] float64, and which groups have equal rewards, [...] bool. A group
        whose rewards are equal up to float32 rounding gets advantage 0; otherwise rounding noise
        divided by epsilon would give advantages in the hundreds.
    """
    values = rewards.to(torch.float64)
    if present is None:
        trimmed = config.trimmed(values.shape[-1])
        low = high = batch = values.sort(dim=-1).values[..., trimmed:] if trimmed else values
        mean = batch.mean(dim=-1, keepdim=True)
        std = batch.std(dim=-1, keepdim=True, correction=config.ddof)
    else:
        present = present.expand_as(values)
        low, high = values.where(present, math.inf), values.where(present, -math.inf)
        batch, values = values[present], values.where(present, 0.0)
        count = present.sum(dim=-1, keepdim=True)
        mean = values.sum(dim=-1, keepdim=True) / count.clamp(min=1)
        squares = (values - mean).where(present, 0.0).square().sum(dim=-1, keepdim=True)
        std = (squares / (count - config.ddof).clamp(min=1)).sqrt()
    if config.normalizer == "global_std":
        std = batch.std(correction=config.ddof).expand_as(mean)
    spread = high.amax(dim=-1, keepdim=True) - low.amin(dim=-1, keepdim=True)
    size = (values if magnitude is None else magnitude).abs().amax(dim=-1, keepdim=True)
    equal = spread <= EQUAL_REWARDS_TOLERANCE * size
    none = equal if present is None else equal | ~present
    centered = torch.where(none, torch.zeros_like(values), values - mean)
    scale = torch.where(equal & (std + config.epsilon == 0), torch.ones_like(std), std)
    return centered / (scale + config.epsilon), equal.squeeze(-1)


def ranks(rewards: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """The ranks of rewards in their group, from 1; ties share their mean rank.

    Args:
        rewards: [..., G].
        present: [..., G] bool, which rewards count, as in :func:`normalize`.

    Returns:
        [..., G] float64; rewards equal up to float32 rounding are ties.
    """
    values = rewards.to(torch.float64)
    apart = values[..., :, None] - values[..., None, :]
    counted = torch.ones_like(values) if present is None else present.expand_as(values).double()
    largest = (values.abs() * counted).amax(dim=-1)[..., None, None]
    above = torch.where(apart.abs() <= EQUAL_REWARDS_TOLERANCE * largest, 0.0, apart.sign())
    return (0.5 * (above + 1.0) * counted[..., None, :]).sum(dim=-1) + 0.5


def member_means(rewards: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
    """Gives all samples of a member their mean reward, [P, number of groups, G].

    Returns:
        The same if each sample is a member, else float64, in which the mean of equals is exact.
    """
    if all(group.share == 1 for group in groups):
        return rewards
    means = rewards.to(torch.float64)
    for place, group in enumerate(groups):
        members = means[:, place].unflatten(-1, (-1, group.share))
        members.copy_(members.mean(dim=-1, keepdim=True).expand_as(members))
    return means


def members(groups: Sequence[Group], group_size: int) -> torch.Tensor | None:
    """The first sample of each member, [groups, G] bool; None if each sample is a member."""
    if all(group.share == 1 for group in groups):
        return None
    samples = range(group_size)
    return torch.tensor([[g % group.share == 0 for g in samples] for group in groups])


def _reduced(rewards: torch.Tensor, groups: Sequence[Group], *, best: bool) -> torch.Tensor:
    """The best or the mean rewards of each step, [P, distinct steps, G] float64, from all groups'.

    The steps are in order of first appearance.
    """
    values = rewards.to(torch.float64)
    parts = [values[:, places] for places in _places_by_step(groups)]
    return torch.stack([part.amax(dim=1) if best else part.mean(dim=1) for part in parts], dim=1)


def _granularity_weights(
    rewards: torch.Tensor, groups: Sequence[Group], config: AdvantageConfig, equal: torch.Tensor
) -> torch.Tensor:
    """The weight of each group's advantages in the sum over a step's groups.

    Args:
        rewards: [P, number of groups, G].
        groups: the groups, in the order of ``rewards``.
        config: its ``granularity_reduction`` is ``mean`` or ``inverse_variance``.
        equal: [P, number of groups] bool, groups whose rewards are equal; they get weight 0 under
            ``inverse_variance``.

    Returns:
        [P, number of groups, 1] float64.
    """
    variance = rewards.to(torch.float64).var(dim=-1, correction=config.ddof)
    precision = torch.where(equal, torch.zeros_like(variance), 1.0 / variance)
    weights = torch.ones_like(variance)
    for places in _places_by_step(groups):
        if config.granularity_reduction == "mean":
            weights[:, places] = 1.0 / len(places)
            continue
        part = precision[:, places]
        total = part.sum(dim=1, keepdim=True)
        share = part / torch.where(total > 0, total, torch.ones_like(total))
        weights[:, places] = share * len(places)
    return weights[..., None]


def _places_by_step(groups: Sequence[Group]) -> Collection[list[int]]:
    """The indices of the groups that credit each step."""
    places: dict[int | None, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group.step, []).append(place)
    return places.values()


def group_advantages(
    rewards: Mapping[str, torch.Tensor],
    weights: Mapping[str, float],
    config: AdvantageConfig,
    groups: Sequence[Group] = (),
) -> tuple[torch.Tensor, dict[str, int]]:
    """Combines the rewards' advantages, group by group, before they are summed over a step's.

    Args:
        rewards: for each reward model, [P, number of groups, G].
        weights: for each reward model, its weight.
        config: normalisation and combination.
        groups: the groups, if they differ in size or a reduction weights those of a step.

    Returns:
        [P, number of groups, G] float64, and for each reward how many groups had equal rewards.
    """
    zero_std_groups = {}
    values = torch.zeros_like(next(iter(rewards.values())), dtype=torch.float64)
    present = members(groups, values.shape[-1])
    for name, reward, weight, magnitude in _terms(rewards, weights, config, present):
        normalized, equal = normalize(reward, config, magnitude, present)
        zero_std_groups[name] = int(equal.sum())
        part = weight * normalized
        if config.granularity_reduction in ("mean", "inverse_variance"):
            part = part * _granularity_weights(reward, groups, config, equal)
        values = values + part
    return values, zero_std_groups


def _terms(
    rewards: Mapping[str, torch.Tensor],
    weights: Mapping[str, float],
    config: AdvantageConfig,
    present: torch.Tensor | None,
) -> list[tuple[str, torch.Tensor, float, torch.Tensor | None]]:
    """The terms normalised separately: name, rewards, weight, and the magnitude of rounding."""
    if config.combination == "mean_of_ranks":
        total = sum(weights.values())
        terms = torch.stack(
            [weights[name] / total * ranks(r, present) for name, r in rewards.items()]
        )
        return [("ranks", terms.sum(0), 1.0, None)]
    if config.combination == "sum_of_rewards":
        terms = torch.stack([weights[name] * r.double() for name, r in rewards.items()])
        return [("sum", terms.sum(0), 1.0, terms.abs().sum(0))]
    total = sum(weights.values()) if config.combination == "normalized_weights" else 1.0
    return [(name, reward, weights[name] / total, None) for name, reward in rewards.items()]


def step_advantages(
    values: torch.Tensor, groups: Sequence[Group], step: int, config: AdvantageConfig
) -> torch.Tensor:
    """The advantages of the transitions of one step, [P, G]: summed over its groups, clamped.

    A group without a step credits every step; one with a step credits only that step, so G2RPO
    sums over its granularities (paper: multi-granularity advantage integration). In groups of fewer
    members than G, the advantages of samples that are not the first of a member have no meaning.
    """
    credited = [index for index, group in enumerate(groups) if group.step in (None, step)]
    summed = values[:, credited].sum(dim=1)
    if config.whiten and bool(summed.ne(0).any()):
        counted = summed[:, :: groups[credited[0]].share]
        scale = counted.std(correction=config.ddof) + config.epsilon
        summed = (summed - counted.mean()) / scale
    return summed.clamp(-config.clip, config.clip)


@dataclass(frozen=True)
class TransitionAdvantages:
    """The advantages of all stochastic transitions, or of all images.

    Attributes:
        by_step: for each recorded step, or for each group of images, [P, G] float64.
        zero_std_groups: for each reward, how many groups had equal rewards.
    """

    by_step: tuple[torch.Tensor, ...]
    zero_std_groups: dict[str, int]


def transition_advantages(
    rewards: Mapping[str, torch.Tensor],
    weights: Mapping[str, float],
    groups: Sequence[Group],
    steps: Sequence[int],
    config: AdvantageConfig,
) -> TransitionAdvantages:
    """The advantages of the transitions of the recorded ``steps``, from the rewards of all groups.

    ``rewards``: for each reward model [P, number of groups, G], in the order of ``groups``.
    """
    if config.granularity_reduction in ("best_of", "reward_mean"):
        best = config.granularity_reduction == "best_of"
        rewards = {name: _reduced(values, groups, best=best) for name, values in rewards.items()}
        groups = list({group.step: replace(group, images=()) for group in groups}.values())
    values, zero_std_groups = group_advantages(rewards, weights, config, groups)
    by_step = tuple(step_advantages(values, groups, step, config) for step in steps)
    return TransitionAdvantages(by_step, zero_std_groups)


def image_advantages(
    rewards: Mapping[str, torch.Tensor], weights: Mapping[str, float], config: AdvantageConfig
) -> TransitionAdvantages:
    """The advantages of the images of every group, each from its own group's rewards."""
    count = next(iter(rewards.values())).shape[1]
    apart = [Group((), place) for place in range(count)]
    return transition_advantages(rewards, weights, apart, range(count), config)
