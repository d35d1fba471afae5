"""Objectives on the forward process, against plain loops over images in their own terms."""

import itertools
import math
from collections import Counter
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from g2rpo.training.forward import (
    AWM,
    DGPO,
    NFT,
    ForwardObjective,
    NoisedImages,
    OldPolicyConfig,
    TimesConfig,
)
from g2rpo.training.old_policy import OldPolicy

LIMIT, GROUP, SHAPE = 5.0, 3, (4, 2)
COUNT = 2 * GROUP
TIMES = [0.9, 0.9, 0.9, 0.3, 0.3, 0.3]
ADVANTAGES = [1.2, -0.7, -5.0, 5.0, 0.0, -2.0]
NAMES = ("velocity", "base", "old", "start")


def random(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(COUNT, *SHAPE, generator=generator, dtype=torch.float64)


CLEAN, NOISE = random(0), random(1)
# Near each other, as policies are.
VELOCITIES = {
    name: NOISE - CLEAN + 0.5 * random(2) + 0.05 * random(3 + i) for i, name in enumerate(NAMES)
}


def seen(velocities: dict[str, Tensor] = VELOCITIES) -> NoisedImages:
    def group_sum(values: Tensor) -> Tensor:
        return values.view(2, GROUP).sum(dim=1).repeat_interleave(GROUP)

    return NoisedImages(
        time=torch.tensor(TIMES, dtype=torch.float64),
        target=NOISE - CLEAN,
        velocity=velocities["velocity"],
        frozen=cast(Any, {name: velocities[name] for name in NAMES[1:]}),
        advantage=torch.tensor(ADVANTAGES, dtype=torch.float64),
        limit=LIMIT,
        group_size=GROUP,
        group_sum=group_sum,
    )


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


class Image:
    """One image and its velocities as lists of numbers."""

    def __init__(self, i: int, velocities: dict[str, Tensor]) -> None:
        self.t, self.a = TIMES[i], ADVANTAGES[i]
        self.x0, self.eps = CLEAN[i].flatten().tolist(), NOISE[i].flatten().tolist()
        self.v = {name: velocities[name][i].flatten().tolist() for name in NAMES}

    def error(self, name: str) -> float:
        rows = zip(self.v[name], self.eps, self.x0, strict=True)
        return mean([(v - (eps - x0)) ** 2 for v, eps, x0 in rows])


def images(velocities: dict[str, Tensor] = VELOCITIES) -> list[Image]:
    return [Image(i, velocities) for i in range(COUNT)]


def nft_loop(image: Image, beta: float) -> float:
    """The loss of one image through its image predictions, as the paper writes it."""
    r = min(max(min(max(image.a, -LIMIT), LIMIT) / (2 * LIMIT) + 0.5, 0.0), 1.0)
    distances = []
    for sign in (1, -1):
        errors = []
        for v, old, x0, eps in zip(
            image.v["velocity"], image.v["old"], image.x0, image.eps, strict=True
        ):
            x_t = (1 - image.t) * x0 + image.t * eps
            mixed = beta * v + (1 - beta) * old if sign == 1 else (1 + beta) * old - beta * v
            errors.append(x_t - image.t * mixed - x0)
        scale = max(mean([abs(e) for e in errors]), 1e-5)
        distances.append(mean([e**2 for e in errors]) / scale)
    return LIMIT * (r * distances[0] + (1 - r) * distances[1]) / beta


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_equals_the_loop(beta: float) -> None:
    terms = NFT(beta=beta).terms(seen(), 1e-4)
    expected = [nft_loop(image, beta) for image in images()]
    assert terms.loss.tolist() == pytest.approx(expected, rel=1e-12)
    assert not terms.clipped.any()


def surrogate(name: str, m: float, t: float) -> float:
    return {
        "ghuber": -((m + 1e-10) ** 0.25 - 1e-10**0.25) * t / 0.25,
        "huber": -(math.sqrt(m + 1e-10) - 1e-5) * t,
        "squared": -m,
        "time": -m * t,
        "time_squared": -m * t**2,
    }[name]


@pytest.mark.parametrize("name", ["ghuber", "huber", "squared", "time", "time_squared"])
@pytest.mark.parametrize("clip", [1.0, 0.003])
def test_awm_equals_the_loop(name: str, clip: float) -> None:
    terms = AWM(surrogate=cast(Any, name), average_weight=0.7).terms(seen(), clip)
    for i, image in enumerate(images()):
        new, before = (surrogate(name, image.error(v), image.t) for v in ("velocity", "start"))
        ratio, a = math.exp(new - before), image.a / LIMIT
        limited = min(max(ratio, 1 - clip), 1 + clip)
        pairs = zip(image.v["velocity"], image.v["old"], strict=True)
        expected = max(-a * ratio, -a * limited) + 0.7 * mean([(v - o) ** 2 for v, o in pairs])
        assert float(terms.loss[i]) == pytest.approx(expected, rel=1e-12)
        assert bool(terms.clipped[i]) == (abs(ratio - 1) > clip)
    if clip < 1:
        assert terms.clipped.any() and not terms.clipped.all()


def test_dgpo_equals_the_loop() -> None:
    clip = 0.002
    terms = DGPO(beta=20.0).terms(seen(), clip)
    every = images()
    moved: Counter[bool] = Counter()
    for i, image in enumerate(every):
        group = every[i // GROUP * GROUP :][:GROUP]
        total = math.fsum(
            one.a * 20.0 * (one.error("velocity") - one.error("base")) / GROUP for one in group
        )
        weight = 1 / (1 + math.exp(-total))
        assert float(terms.loss[i]) == pytest.approx(
            weight * image.a * image.error("velocity"), rel=1e-11
        )
        ratio = math.exp(image.error("old") - image.error("velocity"))
        clipped = ratio > 1 + clip if image.a > 0 else ratio < 1 - clip
        assert bool(terms.clipped[i]) == clipped
        moved[clipped] += 1
    assert moved[True] and moved[False]


def gradient(objective: ForwardObjective, velocities: dict[str, Tensor], clip: float) -> Tensor:
    trained = velocities["velocity"].clone().requires_grad_()
    loss = objective.terms(seen(velocities | {"velocity": trained}), clip).loss.sum()
    return torch.autograd.grad(loss, trained)[0]


def per_image(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)


EQUAL = VELOCITIES | dict.fromkeys(NAMES[1:], VELOCITIES["velocity"])
"""All policies are the same, as before the first update."""
SIZE = math.prod(SHAPE)
MISFIT = VELOCITIES["velocity"] - (NOISE - CLEAN)
ERRORS = [image.error("velocity") for image in images(EQUAL)]


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_the_gradient_of_nft_at_the_old_policy(beta: float) -> None:
    """Both branches are at v_old, so what is left is (2r - 1) times the gradient of one."""
    scale = [
        max(image.t * mean([abs(e) for e in MISFIT[i].flatten().tolist()]), 1e-5)
        for i, image in enumerate(images(EQUAL))
    ]
    factor = [
        LIMIT * (a / LIMIT) * 2 * t**2 / (SIZE * w)
        for a, t, w in zip(ADVANTAGES, TIMES, scale, strict=True)
    ]
    found = gradient(NFT(beta=beta), EQUAL, 1e-4)
    torch.testing.assert_close(found, per_image(factor) * MISFIT, rtol=1e-10, atol=1e-14)


def test_the_gradient_of_awm_at_the_start() -> None:
    """The ratio is 1, so it is -A times that of the surrogate; the average's is 0."""
    factor = [
        a / LIMIT * t * (m + 1e-10) ** -0.75 * 2 / SIZE
        for a, t, m in zip(ADVANTAGES, TIMES, ERRORS, strict=True)
    ]
    found = gradient(AWM(), EQUAL, 1.0)
    torch.testing.assert_close(found, per_image(factor) * MISFIT, rtol=1e-10, atol=1e-14)


def test_the_gradient_of_dgpo_at_the_base() -> None:
    """Every sigmoid is 1/2."""
    factor = [0.5 * a * 2 / SIZE for a in ADVANTAGES]
    found = gradient(DGPO(), EQUAL, 1e-2)
    torch.testing.assert_close(found, per_image(factor) * MISFIT, rtol=1e-10, atol=1e-14)


def test_dgpo_has_no_gradient_where_it_clips_or_in_its_preference() -> None:
    terms = DGPO(beta=20.0).terms(seen(), 0.002)
    found = gradient(DGPO(beta=20.0), VELOCITIES, 0.002)
    weight = terms.loss / torch.tensor(
        [i.a * i.error("velocity") for i in images()], dtype=torch.float64
    )
    for i in range(COUNT):
        if terms.clipped[i] or ADVANTAGES[i] == 0:
            assert found[i].eq(0).all()
        else:
            expected = weight[i] * ADVANTAGES[i] * 2 * MISFIT[i] / SIZE
            torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("objective", [AWM(average_weight=0.7), AWM(surrogate="huber")])
def test_gradients_off_policy_by_finite_differences(objective: ForwardObjective) -> None:
    direction, step = random(9), 1e-6
    sides = []
    for sign in (1, -1):
        moved = VELOCITIES["velocity"] + sign * step * direction
        sides.append(objective.terms(seen(VELOCITIES | {"velocity": moved}), 1.0).loss.sum())
    slope = float(sides[0] - sides[1]) / (2 * step)
    found = float((gradient(objective, VELOCITIES, 1.0) * direction).sum())
    assert found == pytest.approx(slope, rel=1e-6)


# --- times ---------------------------------------------------------------------------------------


def test_nft_trains_all_times_but_one_in_any_order() -> None:
    drawn = [NFT().times.draw(10, 7, 0, "p", g) for g in range(200)]
    assert all(len(set(one)) == 9 for one in drawn)
    left_out = Counter(set(range(10)).difference(one).pop() for one in drawn)
    assert set(left_out) == set(range(10))
    # int(0.99 T), which leaves out more on a long grid.
    assert [NFT().times.number(steps) for steps in (2, 25, 100, 101, 150)] == [1, 24, 99, 99, 148]


def test_the_strata_of_awm_are_those_of_its_code() -> None:
    """linspace(1, 12, 7), truncated, at 14 steps."""
    bounds = [1, 2, 4, 6, 8, 10, 12]
    found = [AWM().times.draw(14, 7, 0, "p", place) for place in range(200)]
    for stratum, (low, high) in enumerate(itertools.pairwise(bounds)):
        assert {one[stratum] for one in found} == set(range(low, high))


def test_dgpo_draws_four_of_the_first_seven_of_ten() -> None:
    found = [DGPO().times.draw(10, seed) for seed in range(200)]
    assert all(len(set(one)) == 4 for one in found)
    assert {step for one in found for step in one} == set(range(7))


def test_a_short_grid_has_fewer_times() -> None:
    numbers = [AWM().times.number(steps) for steps in (3, 6, 8, 14)]
    assert numbers == [1, 4, 6, 6]
    assert sorted(AWM().times.draw(6, 1)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("rule", "steps", "message"),
    [
        (TimesConfig(first=4, until=0.5), 8, "first=4 and until=0.5 leave none of 8 steps; lower"),
        (TimesConfig(first=3, until=0.5), 8, None),
        (TimesConfig(count=1, shared_noise=True), 8, "shared: group or iteration"),
    ],
)
def test_impossible_times_are_refused(rule: TimesConfig, steps: int, message: str | None) -> None:
    if message is None:
        rule.check(steps)
        return
    with pytest.raises(ValueError, match=message):
        rule.check(steps)


# --- the old policy ------------------------------------------------------------------------------


def test_schedules_of_the_old_policy() -> None:
    nft = OldPolicyConfig()
    assert [nft.decay(n) for n in (0, 1, 100, 499, 501)] == [0, 0.001, 0.1, 0.499, 0.5]
    same, late = OldPolicyConfig(limit=0.0), OldPolicyConfig(start=75, slope=0.0075, limit=0.999)
    assert [same.decay(n) for n in (0, 10, 1000)] == [0, 0, 0]
    assert [late.decay(n) for n in (0, 74, 75, 77, 1000)] == [0, 0, 0, 0.015, 0.999]
    dgpo = DGPO().old
    assert dgpo is not None
    assert [dgpo.decay(n) for n in (0, 1, 2, 500)] == [0, 0, 0.001, 0.3]
    # Its code asks for more than 200.
    assert [dgpo.makes_rollouts(n) for n in (0, 200, 201)] == [False, False, True]
    assert [nft.makes_rollouts(n) for n in (0, 1)] == [False, True]
    awm = AWM().old
    assert awm is not None and not awm.makes_rollouts(10**6)


class Weights:
    """Two parameters, and how often they were said to be updated."""

    def __init__(self) -> None:
        self.parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(2))]
        self.updates = 0

    def updated(self) -> None:
        self.updates += 1


def test_the_old_policy_follows_and_is_exchanged_bit_for_bit() -> None:
    weights = Weights()
    old = OldPolicy(OldPolicyConfig(slope=0.25, limit=1 - 2**-10), cast(Any, weights))
    with torch.no_grad():
        weights.parameters[0].mul_(3).add_(0.1)
    trained, before = weights.parameters[0].detach().clone(), old.parameters[0].clone()
    with old.in_use():
        assert torch.equal(weights.parameters[0], before)
        assert torch.equal(old.parameters[0], trained)
    assert torch.equal(weights.parameters[0], trained) and torch.equal(old.parameters[0], before)
    assert weights.updates == 2
    old.follow(1)
    torch.testing.assert_close(old.parameters[0], 0.25 * before + 0.75 * trained)
    old.follow(0)  # without a decay it is the trained policy in every bit
    assert torch.equal(old.parameters[0], trained)
