"""Objectives on the forward process: losses on clean images that are noised again for training.

They need no stochastic step and no log-prob. An image x_0 is noised to x_t = (1 - t) x_0 + t eps at
times t of the rollout's grid, and the velocity at x_t is compared with u = eps - x_0.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from g2rpo.config import StrictModel
from g2rpo.seeds import permutation
from g2rpo.training.objective import ObjectiveTerms, clipped_ratio

FrozenPolicy = Literal["base", "old", "start"]
"""A policy that is not trained: the untrained ``base``, the ``old`` policy that follows the trained
one, and the trained one at the ``start`` of the iteration."""


class TimesConfig(StrictModel):
    """The grid steps k at whose noise levels sigma_k an image is trained."""

    count: int | None = Field(None, ge=1)
    """Times per image and iteration, at most as many as there are steps to draw from; null is
    int(0.99 T), all steps but one of up to 100."""
    first: int = Field(0, ge=0)
    """The first step to draw from."""
    until: float = Field(1.0, gt=0, le=1)
    """Steps below int(until T) are drawn from."""
    stratified: bool = False
    """One time from each of ``count`` equal strata; false draws different steps."""
    shared: Literal["sample", "group", "iteration"] = "sample"
    """Which images have the same times: none, those of a group, or all."""
    shared_noise: bool = False
    """Whether the images of a group also have the same noise, which needs shared times."""

    def check(self, steps: int) -> None:
        """Rejects rules that cannot be drawn on a grid of ``steps`` steps.

        Raises:
            ValueError: one line.
        """
        if not self.among(steps):
            raise ValueError(
                f"objective.times: first={self.first} and until={self.until} leave none of "
                f"{steps} steps; lower objective.times.first or raise objective.times.until"
            )
        if self.shared_noise and self.shared == "sample":
            raise ValueError(
                "objective.times.shared_noise needs objective.times.shared: group or iteration"
            )

    def among(self, steps: int) -> range:
        """The steps to draw from, on a grid of T = ``steps`` steps."""
        # Without the rounding, 0.7 * 10 would be 6.999... steps.
        return range(self.first, math.floor(round(self.until * steps, 9)))

    def number(self, steps: int) -> int:
        """Times per image."""
        wanted = int(0.99 * steps) if self.count is None else self.count
        return min(wanted, len(self.among(steps)))

    def draw(self, steps: int, seed: int, *key: int | str) -> list[int]:
        """The steps of one image, a function of its key alone."""
        among, count = self.among(steps), self.number(steps)
        if not self.stratified:
            order = permutation(len(among), seed, "training-times", *key)
            return [among[place] for place in order[:count]]
        chosen = []
        for stratum in range(count):
            low, high = (among.start + (len(among) * s) // count for s in (stratum, stratum + 1))
            place = permutation(high - low, seed, "training-times", *key, stratum)[0]
            chosen.append(low + place)
        return chosen


class OldPolicyConfig(StrictModel):
    """A second policy, old <- d old + (1 - d) new after each iteration.

    d = min(slope max(0, n - start), limit) after n optimizer steps.
    """

    start: int = Field(0, ge=0)
    slope: float = Field(0.001, ge=0)
    limit: float = Field(0.5, ge=0, lt=1)
    """0 makes it the policy at the start of each iteration."""
    rollouts_after: int | None = Field(0, ge=0)
    """Rollouts use it after more than this many optimizer steps (before the first one, both are the
    same); null: they use the trained policy."""

    def decay(self, steps: int) -> float:
        """d after ``steps`` optimizer steps."""
        return min(self.slope * max(0, steps - self.start), self.limit)

    def makes_rollouts(self, steps: int) -> bool:
        """Whether the rollout after ``steps`` optimizer steps uses it."""
        return self.rollouts_after is not None and steps > self.rollouts_after


@dataclass(frozen=True)
class NoisedImages:
    """What an objective sees of N images, each noised to one time.

    Attributes:
        time: t = sigma of each, [N].
        target: u = eps - x_0, [N, ...].
        velocity: of the trained policy at x_t, [N, ...].
        frozen: velocities of other policies, [N, ...].
        advantage: [N], within plus and minus ``limit``.
        limit: ``advantage.clip``.
        group_size: G.
        group_sum: sums values [N] over the images of the same group and time, for each of them.
    """

    time: Tensor
    target: Tensor
    velocity: Tensor
    frozen: Mapping[FrozenPolicy, Tensor]
    advantage: Tensor
    limit: float
    group_size: int
    group_sum: Callable[[Tensor], Tensor]

    def error(self, velocity: Tensor) -> Tensor:
        """Mean over the latent dimensions of (velocity - u)^2, [N]."""
        return mean_square(velocity - self.target)

    def broadcast(self, values: Tensor) -> Tensor:
        """``values`` [N] in the shape of the latents."""
        return values.view(-1, *([1] * (self.target.dim() - 1)))


class ForwardObjective(StrictModel):
    """Base class of objectives on the forward process; its fields are their configuration."""

    compares_with: ClassVar[tuple[FrozenPolicy, ...]] = ()
    """The frozen policies whose velocities the loss needs."""
    compares_groups: ClassVar[bool] = False
    """Whether the loss of an image depends on the rest of its group."""
    divides_by_clip: ClassVar[bool] = False
    """Whether an advantage counts as a share of ``advantage.clip``."""

    name: str
    times: TimesConfig = TimesConfig()
    old: OldPolicyConfig | None = None
    """The second policy, for methods that have one."""

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, data: Any) -> Any:
        """A part of ``times`` or ``old`` leaves the rest as the objective has it."""
        if not isinstance(data, Mapping):
            return data
        kept = {key: cls.model_fields[key].default for key in ("times", "old")}
        given = {
            k: {**kept[k].model_dump(), **v}
            for k, v in data.items()
            if k in kept and kept[k] is not None and isinstance(v, Mapping)
        }
        return {**data, **given}

    def group_terms(self, images: NoisedImages) -> Tensor:
        """What the loss sums over the images of a group, [N], if it compares them."""
        raise NotImplementedError

    def frozen(self, updates: int) -> tuple[FrozenPolicy, ...]:
        """The frozen policies that are needed with this many updates per iteration."""
        return self.compares_with

    def terms(self, images: NoisedImages, clip_range: float) -> ObjectiveTerms:
        """The loss of each image; ``clip_range`` is that of the optimization."""
        raise NotImplementedError


class NFT(ForwardObjective):
    """DiffusionNFT (arXiv 2509.16117): pulls towards good images and away from bad ones.

    With r = A / (2 limit) + 1/2 in [0, 1], v+ = beta v + (1 - beta) v_old and
    v- = (1 + beta) v_old - beta v, the loss is limit [r D(v+) + (1 - r) D(v-)] / beta, where D is
    the squared error of the image prediction x_t - t v, divided by its mean absolute error.
    """

    compares_with = ("old",)
    divides_by_clip = True

    name: Literal["nft"] = "nft"
    beta: float = Field(1.0, gt=0)
    """Strength; the released configurations have 1 (GenEval, HPS, PickScore) and 0.1."""
    old: OldPolicyConfig | None = OldPolicyConfig()

    def terms(self, images: NoisedImages, clip_range: float) -> ObjectiveTerms:
        """See the class; ``clip_range`` is not used."""
        old, change = images.frozen["old"], self.beta * (images.velocity - images.frozen["old"])
        time = images.broadcast(images.time)

        def distance(velocity: Tensor) -> Tensor:
            # The image prediction's error: x_t - t v - x_0 = t (u - v).
            error = time * (velocity - images.target)
            scale = error.detach().double().abs().flatten(1).mean(dim=1).clamp(min=1e-5)
            return mean_square(error) / scale.to(error.dtype)

        share = (images.advantage / (2 * images.limit) + 0.5).clamp(0, 1)
        loss = share * distance(old + change) + (1 - share) * distance(old - change)
        return ObjectiveTerms(images.limit * loss / self.beta, torch.zeros_like(loss).bool())


class AWM(ForwardObjective):
    """Advantage-weighted matching (arXiv 2509.25050): a clipped ratio of matching losses.

    The log-prob is replaced by minus a function of the matching error m. A squared penalty, with
    weight ``average_weight``, keeps the velocity near the average of the weights.
    """

    divides_by_clip = True

    name: Literal["awm"] = "awm"
    surrogate: Literal["ghuber", "huber", "squared", "time", "time_squared"] = "ghuber"
    """Minus: 4t [(m + 1e-10)^(1/4) - 1e-10^(1/4)]; t [sqrt(m + 1e-10) - 1e-5]; m; m t; m t^2."""
    average_weight: float = Field(1.0, ge=0)
    times: TimesConfig = TimesConfig(count=6, first=1, until=0.9, stratified=True, shared="group")
    old: OldPolicyConfig | None = OldPolicyConfig(limit=0.3, rollouts_after=None)

    def frozen(self, updates: int) -> tuple[FrozenPolicy, ...]:
        """The old policy if it counts; the start of the iteration if there is a second update."""
        old: tuple[FrozenPolicy, ...] = ("old",) if self.average_weight else ()
        return (*old, "start") if updates > 1 else old

    def log_prob(self, images: NoisedImages, velocity: Tensor) -> Tensor:
        """What stands in for the log-prob, [N]."""
        error, time, tiny = images.error(velocity), images.time, 1e-10
        if self.surrogate == "ghuber":
            error = 4 * ((error + tiny) ** 0.25 - tiny**0.25)
        elif self.surrogate == "huber":
            error = (error + tiny).sqrt() - tiny**0.5
        power = {"squared": 0, "time_squared": 2}.get(self.surrogate, 1)
        return -error * time**power

    def terms(self, images: NoisedImages, clip_range: float) -> ObjectiveTerms:
        """See the class."""
        value = self.log_prob(images, images.velocity)
        start = images.frozen.get("start")
        before = value.detach() if start is None else self.log_prob(images, start)
        terms = clipped_ratio(value - before, images.advantage / images.limit, clip_range)
        if not self.average_weight:
            return terms
        drift = mean_square(images.velocity - images.frozen["old"])
        return ObjectiveTerms(terms.loss + self.average_weight * drift, terms.clipped)


class DGPO(ForwardObjective):
    """DGPO (arXiv 2510.08425): direct preference of the better part of a group over the rest.

    With d the matching error and S the group's sum of A beta (d - d_base) / G, the loss is
    sigmoid(S) A d, where S is a constant. An image whose error the update has already moved beyond
    the clip range, against the old policy's, has no gradient.
    """

    compares_with = ("base", "old")
    compares_groups = True

    name: Literal["dgpo"] = "dgpo"
    beta: float = Field(100.0, gt=0)
    times: TimesConfig = TimesConfig(count=4, until=0.7, shared="iteration", shared_noise=True)
    old: OldPolicyConfig | None = OldPolicyConfig(start=1, limit=0.3, rollouts_after=200)

    def group_terms(self, images: NoisedImages) -> Tensor:
        """A beta (d - d_base) / G, [N], without a gradient."""
        gain = images.error(images.velocity.detach()) - images.error(images.frozen["base"])
        return images.advantage * self.beta * gain / images.group_size

    def terms(self, images: NoisedImages, clip_range: float) -> ObjectiveTerms:
        """See the class."""
        error, advantage = images.error(images.velocity), images.advantage
        preference = images.group_sum(self.group_terms(images)).sigmoid()
        ratio = torch.exp(images.error(images.frozen["old"]) - error.detach())
        better = advantage > 0
        clipped = torch.where(better, ratio > 1 + clip_range, ratio < 1 - clip_range)
        trained = torch.where(clipped, error.detach(), error)
        return ObjectiveTerms(preference * advantage * trained, clipped)


def mean_square(difference: Tensor) -> Tensor:
    """The mean of the squares over all dimensions but the first, [N]."""
    return (difference**2).flatten(1).mean(dim=1)
