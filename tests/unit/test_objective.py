"""The objectives off-policy, the KL, and how an iteration is split into updates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from g2rpo.config import StrictModel, validate
from g2rpo.errors import UserError
from g2rpo.flow.sweep import RecordedStep
from g2rpo.flow.transition import (
    CPSTransition,
    Transition,
    log_prob,
    per_state,
    transition_mean,
)
from g2rpo.training.batch import TransitionBatch, collect_transitions, split_updates
from g2rpo.training.config import OptimizationConfig, TrainConfig
from g2rpo.training.objective import (
    DPPO,
    Clipped,
    Guard,
    Transitions,
    clipped_ratio,
    transition_kl,
)
from g2rpo.training.objectives import AnyObjective, parse_objective
from g2rpo.training.update import loss

CLIP = 1e-4


def doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop_loss(new: float, old: float, advantage: float, clip: float) -> float:
    ratio = math.exp(new - old)
    limited = min(max(ratio, 1 - clip), 1 + clip)
    return -min(advantage * ratio, advantage * limited)


# --- the clipped objective -----------------------------------------------------------------------

# log-ratios inside and outside of the clip range, both signs of the advantage, and none.
LOG_RATIOS = [0.0, 4e-5, -4e-5, 9.9e-5, -9.9e-5, 2e-4, -2e-4, 0.1, -0.1, 1.5, -1.5]
ADVANTAGES = [2.5, -2.5, 0.3, -0.3, 0.0, 5.0, -5.0]
CASES = [(ratio, advantage) for ratio in LOG_RATIOS for advantage in ADVANTAGES]


def test_loss_equals_the_loop_off_policy() -> None:
    old = 0.3 * random(len(CASES), seed=0)
    new = old + doubles([ratio for ratio, _ in CASES])
    advantage = doubles([a for _, a in CASES])
    terms = clipped_ratio(new - old, advantage, CLIP)
    for i, (log_ratio, _) in enumerate(CASES):
        expected = loop_loss(float(new[i]), float(old[i]), float(advantage[i]), CLIP)
        assert float(terms.loss[i]) == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert bool(terms.clipped[i]) == (abs(math.exp(log_ratio) - 1) > CLIP)
    assert 0 < int(terms.clipped.sum()) < len(CASES)


def test_gradient_equals_finite_differences() -> None:
    old = 0.3 * random(len(CASES), seed=0)
    new = (old + doubles([ratio for ratio, _ in CASES])).requires_grad_()
    advantage = doubles([a for _, a in CASES])
    clipped_ratio(new - old, advantage, CLIP).loss.sum().backward()
    assert new.grad is not None
    step = 1e-7  # stays on the same side of every kink above
    for i in range(len(CASES)):
        at, before, a = float(new[i].detach()), float(old[i]), float(advantage[i])
        slope = loop_loss(at + step, before, a, CLIP) - loop_loss(at - step, before, a, CLIP)
        assert float(new.grad[i]) == pytest.approx(slope / (2 * step), rel=1e-6, abs=1e-8)


def test_a_nan_is_not_hidden_by_the_clip() -> None:
    for advantage in (1.0, -1.0, 0.0):
        terms = clipped_ratio(doubles([math.nan]), doubles([advantage]), CLIP)
        assert torch.isnan(terms.loss).all()


@pytest.mark.parametrize("log_ratio", [88.0, 89.0, 1000.0])
def test_a_ratio_that_overflows_has_the_clipped_loss_and_no_gradient(log_ratio: float) -> None:
    """exp(89) is no float32; where the advantage is negative, nothing limits the loss."""
    change = torch.full((2,), log_ratio).requires_grad_()
    terms = clipped_ratio(change, torch.tensor([1.5, 0.0]), 0.1)
    terms.loss.sum().backward()
    assert terms.loss.tolist() == pytest.approx([-1.65, 0.0])
    assert change.grad is not None and change.grad.tolist() == [0, 0]
    assert terms.clipped.all()
    assert clipped_ratio(change, torch.tensor([-1.0, -1.0]), 0.1).loss.min() > 1e38


# --- the other objectives ------------------------------------------------------------------------

LATENT, COUNT = (3, 2), 24
STEP_OF = torch.arange(COUNT) % 3
STDS, DURATIONS = (0.9, 0.4, 0.15), (0.05, 0.1, 0.2)
OLD = random(COUNT, *LATENT, seed=50)
AFTER = OLD + doubles(STDS)[STEP_OF].view(-1, 1, 1) * random(COUNT, *LATENT, seed=51)
DRIFT = random(COUNT, *LATENT, seed=52)
SIZE = torch.logspace(-5, -0.5, COUNT, dtype=torch.float64)[torch.arange(COUNT) * 7 % COUNT]
WANTED = 2 * random(COUNT, seed=53)


def seen(mean: Tensor, *, cps: bool = False, whole: bool = True) -> Transitions:
    """Transitions under a policy with ``mean``, drawn under one with the mean ``OLD``."""
    law = (CPSTransition if cps else Transition)(0.5, 0.4, 0.3)
    std = doubles(STDS)[STEP_OF].view(-1, 1, 1)
    return Transitions(
        law.log_prob(AFTER, mean, std), law.log_prob(AFTER, OLD, std), WANTED, AFTER, mean, OLD,
        std, doubles(DURATIONS)[STEP_OF], STEP_OF, whole,
    )  # fmt: skip


def drifted(scale: float = 1.0) -> Tensor:
    return OLD + scale * SIZE.view(-1, 1, 1) * DRIFT


def loop_kl(mean: list[float], old: list[float], std: float) -> float:
    return math.fsum((a - b) ** 2 for a, b in zip(mean, old, strict=True)) / (2 * std**2) / 6


def loop_log_density(after: list[float], mean: list[float], std: float) -> float:
    return math.fsum(
        -((a - m) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))
        for a, m in zip(after, mean, strict=True)
    ) / len(mean)


def loop_guard(mean: Tensor, published: str, clip: float) -> list[float]:
    """From the log-densities and the divergence, as the papers and codes write it."""
    rows = [list(map(float, row)) for row in mean.flatten(1)]
    old, after = OLD.flatten(1).tolist(), AFTER.flatten(1).tolist()
    stds = [STDS[int(k)] for k in STEP_OF]
    kls = [loop_kl(rows[i], old[i], stds[i]) for i in range(COUNT)]
    losses = []
    for i, std in enumerate(stds):
        same = [kls[j] for j in range(COUNT) if STEP_OF[j] == STEP_OF[i]]
        bias = math.fsum(same) / len(same) if published == "flow_grpo" else kls[i]
        new, before = (loop_log_density(after[i], m[i], std) for m in (rows, old))
        duration = 1.0 if published == "flow_factory" else DURATIONS[int(STEP_OF[i])]
        losses.append(
            loop_loss(std * (new - before + bias), 0.0, float(WANTED[i]), clip) / duration
        )
    return losses


def loop_dppo(mean: Tensor, threshold: float) -> list[float]:
    rows = [list(map(float, row)) for row in mean.flatten(1)]
    old, after = OLD.flatten(1).tolist(), AFTER.flatten(1).tolist()
    losses = []
    for i in range(COUNT):
        std, a = STDS[int(STEP_OF[i])], float(WANTED[i])
        new, before = (loop_log_density(after[i], m[i], std) for m in (rows, old))
        further = a * (new - before) > 0
        dropped = further and loop_kl(rows[i], old[i], std) >= threshold
        losses.append(0.0 if dropped else -a * math.exp(new - before))
    return losses


Loop = Callable[[Tensor], list[float]]
OBJECTIVES: list[tuple[AnyObjective, Loop]] = [
    (Guard(), lambda mean: loop_guard(mean, "pref_grpo", 1e-3)),
    (Guard(published="verl_omni"), lambda mean: loop_guard(mean, "verl_omni", 1e-3)),
    (Guard(published="flow_factory"), lambda mean: loop_guard(mean, "flow_factory", 1e-3)),
    (Guard(published="flow_grpo"), lambda mean: loop_guard(mean, "flow_grpo", 1e-3)),
    (DPPO(threshold=1e-4), lambda mean: loop_dppo(mean, 1e-4)),
]
IDS = ["pref_grpo", "verl_omni", "flow_factory", "flow_grpo", "dppo"]


@pytest.mark.parametrize(("objective", "loop"), OBJECTIVES, ids=IDS)
def test_an_objective_equals_its_loop_off_policy(objective: AnyObjective, loop: Loop) -> None:
    terms = objective.terms(seen(drifted()), 1e-3)
    assert terms.loss.tolist() == pytest.approx(loop(drifted()), rel=1e-10, abs=1e-12)
    assert 0 < int(terms.clipped.sum()) < COUNT


@pytest.mark.parametrize(("objective", "loop"), OBJECTIVES, ids=IDS)
def test_its_gradient_equals_finite_differences(objective: AnyObjective, loop: Loop) -> None:
    scale = doubles([1.0]).requires_grad_()
    mean = OLD + scale * SIZE.view(-1, 1, 1) * DRIFT
    objective.terms(seen(mean), 1e-3).loss.sum().backward()
    step = 1e-6  # on the same side of every kink
    slope = math.fsum(loop(drifted(1 + step))) - math.fsum(loop(drifted(1 - step)))
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(slope / (2 * step), rel=1e-5)


@pytest.mark.parametrize("cps", [False, True])
def test_before_an_update_every_ratio_is_one_and_the_loss_the_advantage(cps: bool) -> None:
    for objective in (Clipped(), Guard(published="flow_factory"), DPPO()):
        terms = objective.terms(seen(OLD.clone(), cps=cps), 1e-6)
        assert torch.equal(terms.loss, -WANTED)
        assert not terms.clipped.any()


def test_dppo_drops_a_ratio_that_overflows_with_its_gradient() -> None:
    new = doubles([1000.0, -1000.0, 0.1]).requires_grad_()
    far, near = torch.ones(3, 2), torch.zeros(3, 2)
    terms = DPPO().terms(
        Transitions(
            new, doubles([0.0, 0.0, 0.0]), doubles([1.0, -1.0, -1.0]), near, far, near,
            torch.ones(3, 1), torch.ones(3), torch.zeros(3, dtype=torch.int64),
        ),
        CLIP,
    )  # fmt: skip
    terms.loss.sum().backward()
    assert new.grad is not None
    assert terms.clipped.tolist() == [True, True, False]
    assert terms.loss.tolist() == [0, 0, pytest.approx(math.exp(0.1))]
    assert new.grad.tolist() == [0, 0, pytest.approx(math.exp(0.1))]


def test_the_ratio_of_guard_does_not_depend_on_the_form_of_the_log_prob() -> None:
    one, other = (Guard().terms(seen(drifted(), cps=cps), 1e-3) for cps in (False, True))
    assert torch.equal(one.loss, other.loss)


def test_an_average_over_the_update_is_refused_in_a_part_of_it() -> None:
    with pytest.raises(UserError, match=r"^objective.published=flow_grpo [^\n]*micro_batch"):
        Guard(published="flow_grpo").terms(seen(drifted(), whole=False), 1e-3)
    Guard().terms(seen(drifted(), whole=False), 1e-3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "gaurd"}, "did you mean 'guard'"),
        ({"threshold": 1.0}, "expected a mapping with a name"),
        ({"name": "dppo", "treshold": 1.0}, "'objective.treshold'; did you mean 'threshold'"),
        ({"name": "guard", "published": "mine"}, "objective.published"),
    ],
)
def test_a_mistaken_objective_is_named_in_one_line(value: dict[str, Any], message: str) -> None:
    class Part(StrictModel):
        objective: TrainConfig.__annotations__["objective"] = Clipped()  # type: ignore[valid-type]

    with pytest.raises(UserError, match=message) as caught:
        validate(Part, {"objective": value}, "here")
    assert "\n" not in str(caught.value)


def test_the_default_objective_is_not_in_the_hashed_configuration() -> None:
    config = TrainConfig.model_construct(optimization=OptimizationConfig())
    assert "objective" not in config.model_dump(include={"objective"})
    other = TrainConfig.model_construct(objective=parse_objective({"name": "dppo"}))
    assert other.model_dump(include={"objective"})["objective"]["threshold"] == 1e-5


# --- KL ------------------------------------------------------------------------------------------


def test_kl_is_the_mean_over_dimensions_of_the_normals_kl() -> None:
    mean, reference = random(4, 3, 5, seed=1), random(4, 3, 5, seed=2)
    stds = [0.05, 0.4, 1.0, 3.0]
    found = transition_kl(mean, reference, per_state(stds, mean))
    for i, std in enumerate(stds):
        normal = torch.distributions.Normal
        exact = torch.distributions.kl_divergence(normal(mean[i], std), normal(reference[i], std))
        assert float(found[i]) == pytest.approx(float(exact.mean()), rel=1e-12)
    assert transition_kl(mean, mean, per_state(stds, mean)).eq(0).all()


# --- collecting and splitting transitions --------------------------------------------------------

PROMPTS, GROUP, DIM = 2, 6, (2, 3)


def record(step: int, sources: int, seed: int, samples: Sequence[int]) -> RecordedStep:
    """Off-policy data: the stored log-probabilities are near, but not, those of the model below."""
    source_of = torch.arange(GROUP) if sources == GROUP else torch.zeros(GROUP, dtype=torch.long)
    law = Transition(1.0 - 0.1 * step, 0.9 - 0.1 * step, 0.4 + 0.1 * step)
    states = random(PROMPTS, sources, *DIM, seed=seed)
    after = states[:, source_of] + law.std * random(PROMPTS, GROUP, *DIM, seed=seed + 1)
    old = torch.stack([log_prob_of(states[p, source_of], after[p], law) for p in range(PROMPTS)])
    shift = 1e-4 * random(PROMPTS, GROUP, seed=seed + 2)
    old = (old + shift).detach()
    means = states + 0.01 * random(PROMPTS, sources, *DIM, seed=seed + 3)
    return RecordedStep(step, 0.5, law, states, means, source_of, tuple(samples), after, old)


WEIGHTS = random(3, 3, seed=90).requires_grad_()


def log_prob_of(states: Tensor, after: Tensor, law: Transition) -> Tensor:
    mean = transition_mean(states, torch.tanh(states @ WEIGHTS), [law] * len(states))
    return log_prob(after, mean, per_state([law.std] * len(states), mean))


IN_ORDER, SHUFFLED = range(GROUP), (3, 0, 5, 1, 4, 2)
RECORDED = (
    record(0, 1, 10, IN_ORDER),
    record(1, GROUP, 20, IN_ORDER),
    record(2, GROUP, 30, SHUFFLED),
)
BY_STEP = tuple(2 * random(PROMPTS, GROUP, seed=40 + step) for step in range(3))
ALL = [[(0, 1, 2)] * GROUP] * PROMPTS
# Two of three steps for each sample; step 0 of the second prompt is trained by one sample alone.
SUBSETS = [
    [(0, 1), (1, 2), (0, 2), (0, 1), (1, 2), (0, 2)],
    [(1, 2), (1, 2), (1, 2), (0, 2), (1, 2), (1, 2)],
]


class Everything:
    """A conditioning on nothing."""

    def select(self, prompts: Tensor) -> None:
        assert prompts.max() < PROMPTS


class Toy:
    """A policy whose velocity is that of ``log_prob_of``."""

    def velocity(self, states: Tensor, times: Tensor, conditioning: None) -> Tensor:
        assert times.tolist() == [0.5] * len(states)
        return torch.tanh(states @ WEIGHTS)


def collect(trained: Sequence[Sequence[Sequence[int]]]) -> TransitionBatch:
    return collect_transitions(RECORDED, BY_STEP, trained, cast(Any, Everything()))


@pytest.mark.parametrize(("trained", "states", "count"), [(ALL, 26, 36), (SUBSETS, 21, 24)])
def test_collected_transitions_are_the_trained_ones(
    trained: Sequence[Sequence[Sequence[int]]], states: int, count: int
) -> None:
    batch = collect(trained)
    assert len(batch) == count
    # A shared state is there once, and only where one of its transitions is trained.
    assert len(batch.states) == len(batch.steps) == len(batch.transitions) == states
    assert set(batch.state_of.tolist()) == set(range(states))
    wanted = {
        (step, prompt, sample)
        for prompt in range(PROMPTS)
        for sample in range(GROUP)
        for step in trained[prompt][sample]
    }
    for i in range(count):
        state, sample = int(batch.state_of[i]), int(batch.samples[i])
        step, prompt = batch.steps[state], int(batch.prompts[state])
        wanted.remove((step, prompt, sample))
        origin = RECORDED[step]
        place = origin.samples.index(sample)
        assert torch.equal(batch.states[state], origin.sources[prompt, origin.source_of[place]])
        assert torch.equal(batch.next_latents[i], origin.next_latents[prompt, place])
        assert batch.log_prob[i] == origin.log_prob[prompt, place]
        assert batch.advantage[i] == BY_STEP[step][prompt, sample]
        assert batch.transitions[state] == origin.transition
        old_mean = origin.means[prompt, origin.source_of[place]]
        assert torch.equal(batch.old_means[state], old_mean)
    assert not wanted


def keys(batch: TransitionBatch) -> set[tuple[int, int, int]]:
    found = {
        (batch.steps[state], int(batch.prompts[state]), int(sample))
        for state, sample in zip(batch.state_of.tolist(), batch.samples, strict=True)
    }
    assert len(found) == len(batch)
    return found


@pytest.mark.parametrize("trained", [ALL, SUBSETS])
@pytest.mark.parametrize("updates", [1, 2, 3, 6])
def test_updates_split_the_samples(
    updates: int, trained: Sequence[Sequence[Sequence[int]]]
) -> None:
    batch = collect(trained)
    found = split_updates(batch, OptimizationConfig(updates_per_iteration=updates), GROUP)
    assert len(found) == updates
    seen: set[tuple[int, int, int]] = set()
    for index, update in enumerate(found):
        size = GROUP // updates
        assert {sample for _, _, sample in keys(update)} == set(
            range(index * size, (index + 1) * size)
        )
        assert update.weight * len(update) == pytest.approx(1)
        assert not seen & keys(update)
        seen |= keys(update)
    assert len(seen) == len(batch)


def batched_update(update: TransitionBatch, size: int) -> tuple[float, Tensor]:
    """Loss and gradient of one update, one forward per micro-batch."""
    total = 0.0
    gradient = torch.zeros_like(WEIGHTS)
    config = TrainConfig.model_construct(optimization=OptimizationConfig(clip_range=CLIP))
    for part in update.split(size):
        found = loss(cast(Any, Toy()), part, config)
        gradient += torch.autograd.grad(found.loss, WEIGHTS)[0]
        total += float(found.loss.detach())
    return total, gradient


def loop_update(members: set[tuple[int, int, int]]) -> tuple[float, Tensor]:
    """The mean over (step, prompt, sample), one by one, in the textbook form of the density."""
    terms = []
    for step, prompt, sample in sorted(members):
        origin = RECORDED[step]
        law = origin.transition
        place = origin.samples.index(sample)
        x = origin.sources[prompt, 0 if origin.sources.shape[1] == 1 else place]
        v = torch.tanh(x @ WEIGHTS)
        x0 = x - law.sigma * v
        score = -(x - (1 - law.sigma) * x0) / law.sigma**2
        dt = law.sigma_next - law.sigma
        mean = x + (v - 0.5 * law.diffusion**2 * score) * dt
        normal = torch.distributions.Normal(mean, law.diffusion * math.sqrt(-dt))
        new = normal.log_prob(origin.next_latents[prompt, place]).mean()
        ratio = torch.exp(new - origin.log_prob[prompt, place])
        a = float(BY_STEP[step][prompt, sample])
        value = float(ratio.detach())
        limited = min(max(value, 1 - CLIP), 1 + CLIP)
        # Clipped, the term is a number; at equality inside of the range it is the ratio's own.
        constant = torch.tensor(-a * limited, dtype=torch.float64)
        terms.append(-a * ratio if -a * value >= -a * limited else constant)
    loss = torch.stack(terms).mean()
    return float(loss.detach()), torch.autograd.grad(loss, WEIGHTS)[0]


@pytest.mark.parametrize("size", [1, 5, 100])
def test_a_step_is_weighted_after_the_objective(size: int) -> None:
    batch = collect(ALL)
    by_step = doubles([2.0, 0.5, 0.1])
    weight = by_step[torch.tensor(batch.steps)][batch.state_of]
    found, gradient = batched_update(replace(batch, step_weight=weight), size)
    parts = split_updates(batch, OptimizationConfig(update_every="timestep"), GROUP)
    separate = [batched_update(part, 100) for part in parts]
    expected = sum(float(w) * one for w, (one, _) in zip(by_step, separate, strict=True)) / 3
    assert found == pytest.approx(expected, rel=1e-10)
    slopes = (
        torch.stack([w * one for w, (_, one) in zip(by_step, separate, strict=True)]).sum(0) / 3
    )
    torch.testing.assert_close(gradient, slopes, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trained", [ALL, SUBSETS])
@pytest.mark.parametrize(
    "config",
    [
        OptimizationConfig(),
        OptimizationConfig(update_every="timestep"),
        OptimizationConfig(updates_per_iteration=3),
    ],
)
def test_loss_and_gradient_equal_the_loop_at_every_micro_batch_size(
    config: OptimizationConfig, trained: Sequence[Sequence[Sequence[int]]]
) -> None:
    batch = collect(trained)
    updates = split_updates(batch, config, GROUP)
    if config.update_every == "timestep":
        assert [{step for step, _, _ in keys(one)} for one in updates] == [{0}, {1}, {2}]
    for update in updates:
        expected, gradient = loop_update(keys(update))
        assert gradient.abs().max() > 1e-3
        for size in (1, 2, 5, 100):
            parts = list(update.split(size))
            # Each state goes through one forward, whatever the number of its transitions.
            assert sum(len(part.states) for part in parts) == len(update.states)
            assert all(0 < len(part.states) <= size for part in parts)
            found_loss, found_gradient = batched_update(update, size)
            assert found_loss == pytest.approx(expected, rel=1e-10, abs=1e-12)
            torch.testing.assert_close(found_gradient, gradient, rtol=1e-10, atol=1e-12)


def test_the_data_of_the_loop_test_is_inside_and_outside_of_the_clip_range() -> None:
    batch = collect(ALL)
    with torch.no_grad():
        new = torch.cat(
            [
                log_prob_of(
                    batch.states[batch.state_of[i : i + 1]],
                    batch.next_latents[i : i + 1],
                    batch.transitions[int(batch.state_of[i])],
                )
                for i in range(len(batch))
            ]
        )
    terms = clipped_ratio(new - batch.log_prob, batch.advantage, CLIP)
    for sign in (1, -1):
        chosen = (sign * batch.advantage) > 0
        assert 0 < int(terms.clipped[chosen].sum()) < int(chosen.sum())
