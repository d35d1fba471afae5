"""The sweep equals the naive loop over samples, steps and granularities, for every method."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import Group, RolloutTree
from g2rpo.flow.schedule import GridConfig, SigmaGrid, build_grid
from g2rpo.flow.sweep import INITIAL_NOISE, RecordedStep, Sweep, SweepSettings, sweep
from g2rpo.flow.transition import Kernel, per_state, transition_mean, transitions
from g2rpo.methods import (
    branch_grpo,
    dance_grpo,
    flow_grpo,
    flow_grpo_fast,
    g2rpo,
    mix_grpo,
    tempflow_grpo,
)
from g2rpo.methods.base import Method, RolloutShape

PROMPTS, TOKENS, CHANNELS = 2, 4, 6
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SHIFT = 3.0


class ToyTransformer(nn.Module):
    """One block of attention and a gated layer over tokens, conditioned on time and prompt."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def weights(*shape: int) -> nn.Parameter:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter((values / math.sqrt(shape[0])).to(dtype))

        width = 8
        self.inward, self.outward = weights(CHANNELS, width), weights(width, CHANNELS)
        self.qkv, self.gate = weights(width, 3 * width), weights(width, width)
        self.prompt, self.time = weights(PROMPTS, width), weights(2, width)
        self.rows = 0

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        self.rows += len(x)
        phase = torch.stack([torch.sin(4 * time), torch.cos(7 * time)], dim=1).to(x.dtype)
        h = x @ self.inward + (phase @ self.time + self.prompt[prompt])[:, None]
        query, key, value = (h @ self.qkv).chunk(3, dim=-1)
        h = h + nn.functional.scaled_dot_product_attention(query, key, value)
        h = h + torch.tanh(h @ self.gate)
        return 1.5 * torch.tanh(h @ self.outward)


def noise(prompt: int, sample: int, step: int) -> Tensor:
    seed = 1 + (prompt * 64 + sample) * 64 + step
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, CHANNELS, generator=generator, dtype=torch.float64)


# --- the original way: one sample, one step, one granularity at a time ---------------------------


@dataclass
class Naive:
    """Rolls out sample by sample and recomputes everything for each of them."""

    model: ToyTransformer
    times: tuple[float, ...]
    samples: int
    dtype: torch.dtype
    images: dict[tuple[int, int | None, int], list[Tensor]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """By (prompt, stochastic step or None, place of the granularity): one image per sample."""
    recorded: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict
    )
    """By (prompt, step, sample): x_k, x_{k+1} and the log-probability."""
    anchors: list[Tensor] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def sigma(self, node: int) -> float:
        u = (self.steps - node) / self.steps
        return SHIFT * u / (1 + (SHIFT - 1) * u)

    def start(self, prompt: int, sample: int = 0) -> Tensor:
        return noise(prompt, sample, INITIAL_NOISE).to(self.dtype)

    def velocity(self, x: Tensor, node: int, prompt: int) -> Tensor:
        time = torch.tensor([self.times[node]], dtype=self.dtype)
        with torch.no_grad():
            return self.model(x[None], time, torch.tensor([prompt]))[0]

    def ode(self, x: Tensor, node: int, target: int, prompt: int) -> Tensor:
        return x + self.velocity(x, node, prompt) * (self.sigma(target) - self.sigma(node))

    def sde(
        self,
        x: Tensor,
        node: int,
        g: float,
        prompt: int,
        sample: int,
        *,
        record: bool = True,
        scale: float = 1.0,
    ) -> Tensor:
        """Drift and score written apart, the density from torch.distributions."""
        sigma, dt = self.sigma(node), self.sigma(node + 1) - self.sigma(node)
        v = self.velocity(x, node, prompt)
        score = -(x - (x - sigma * v) * (1 - sigma)) / sigma**2
        mean = x + v * dt - 0.5 * g**2 * score * dt
        std = scale * g * math.sqrt(-dt)
        after = mean + std * noise(prompt, sample, node).to(self.dtype)
        if record:
            density = torch.distributions.Normal(mean, std).log_prob(after).mean()
            self.recorded[prompt, node, sample] = (x, after, density)
        return after

    def flow_g(self, node: int, eta: float) -> float:
        sigma = self.sigma(node)
        return eta * math.sqrt(sigma / (1 - (self.sigma(1) if node == 0 else sigma)))

    def g2rpo(self, eta: float, chosen: tuple[int, ...], granularities: tuple[int, ...]) -> None:
        for prompt in range(PROMPTS):
            anchor = [self.start(prompt)]
            for node in range(self.steps):
                anchor.append(self.ode(anchor[-1], node, node + 1, prompt))
            self.anchors.append(anchor[-1])
            for k in chosen:
                for sample in range(self.samples):
                    branch = self.sde(anchor[k], k, self.flow_g(k, eta), prompt, sample)
                    for place, granularity in enumerate(granularities):
                        image = self.continuation(branch, k, granularity, prompt)
                        self.images[prompt, k, place].append(image)

    def continuation(self, x: Tensor, k: int, granularity: int, prompt: int) -> Tensor:
        visited = [k + 1]
        node = k + 2
        while node <= self.steps:
            visited.append(node)
            node += granularity
        evaluated = visited[:-1]
        for node, target in itertools.pairwise(evaluated):
            x = self.ode(x, node, target, prompt)
        last = evaluated[-1]
        return x - self.sigma(last) * self.velocity(x, last, prompt)

    def dance_grpo(self, eta: float) -> None:
        for prompt in range(PROMPTS):
            for sample in range(self.samples):
                x = self.start(prompt)
                for node in range(self.steps - 1):
                    x = self.sde(x, node, eta, prompt, sample)
                last = self.steps - 1
                image = x - self.sigma(last) * self.velocity(x, last, prompt)
                self.images[prompt, None, 0].append(image)

    def branch_grpo(self, eta: float, splits: tuple[int, ...], scale: float) -> None:
        """Each leaf's whole path, with the noise of the first leaf below each of its nodes."""
        for prompt in range(PROMPTS):
            for leaf in range(self.samples):
                x, below, last = self.start(prompt), self.samples, self.steps - 1
                for node in range(self.steps):
                    image = x - self.sigma(last) * self.velocity(x, last, prompt)
                    below //= 2 if node in splits else 1
                    first, larger = leaf - leaf % below, scale if node in splits else 1.0
                    x = self.sde(x, node, eta, prompt, first, scale=larger)
                for node in range(self.steps):
                    self.images[prompt, node, 0].append(image)

    def mix_grpo(self, eta: float, window: tuple[int, ...]) -> None:
        for prompt in range(PROMPTS):
            for sample in range(self.samples):
                x = self.start(prompt)
                for node in range(self.steps):
                    if node in window:
                        x = self.sde(x, node, self.flow_g(node, eta), prompt, sample)
                    else:
                        x = self.ode(x, node, node + 1, prompt)
                self.images[prompt, None, 0].append(x)

    def cps(self, x: Tensor, node: int, level: float, prompt: int, sample: int) -> Tensor:
        """The predictions of image and noise, recombined with less of the latter."""
        v = self.velocity(x, node, prompt)
        sigma, after = self.sigma(node), self.sigma(node + 1)
        image, predicted = x - sigma * v, x + (1 - sigma) * v
        std = after * math.sin(level * math.pi / 2)
        mean = (1 - after) * image + math.sqrt(after**2 - std**2) * predicted
        moved = mean + std * noise(prompt, sample, node).to(self.dtype)
        self.recorded[prompt, node, sample] = (x, moved, -(moved - mean).square().mean())
        return moved

    def fast(self, eta: float, chosen: tuple[int, ...], *, cps: bool, shared: bool) -> None:
        for prompt in range(PROMPTS):
            for sample in range(self.samples):
                x = self.start(prompt, 0 if shared else sample)
                for node in range(self.steps):
                    if node not in chosen:
                        x = self.ode(x, node, node + 1, prompt)
                    elif cps:
                        x = self.cps(x, node, eta, prompt, sample)
                    else:
                        x = self.sde(x, node, self.flow_g(node, eta), prompt, sample)
                self.images[prompt, None, 0].append(x)

    def flow_grpo(self, eta: float, *, shared: bool) -> None:
        for prompt in range(PROMPTS):
            for sample in range(self.samples):
                x = self.start(prompt, 0 if shared else sample)
                for node in range(self.steps):
                    g, record = self.flow_g(node, eta), node < self.steps - 1
                    x = self.sde(x, node, g, prompt, sample, record=record)
                self.images[prompt, None, 0].append(x)


# --- the comparison ------------------------------------------------------------------------------


def grid_of(steps: int) -> SigmaGrid:
    return build_grid(GridConfig(steps=steps, shift=SHIFT, timestep="truncated"), image_tokens=16)


def run(
    method: Method,
    shape: RolloutShape,
    dtype: torch.dtype,
    *,
    iteration: int = 0,
    micro_batch: int = 64,
    prompts: int = PROMPTS,
) -> tuple[RolloutTree, Sweep, ToyTransformer]:
    grid, model = grid_of(shape.steps), ToyTransformer(dtype)
    tree = method.rollout_tree(shape, iteration)
    settings = SweepSettings(method.transitions(grid.sigmas), micro_batch, dtype)
    return tree, sweep(tree, grid, prompts, model, noise, settings), model


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def group_images(tree: RolloutTree, swept: Sweep, group: Group) -> Tensor:
    place = {state: index for index, state in enumerate(tree.images)}
    return swept.images[:, [place[state] for state in group.images]]


def compare(tree: RolloutTree, swept: Sweep, naive: Naive) -> None:
    seen: dict[int | None, int] = defaultdict(int)
    for group in tree.groups:
        images = group_images(tree, swept, group)
        for prompt in range(PROMPTS):
            expected = naive.images.pop((prompt, group.step, seen[group.step]))
            close(images[prompt], torch.stack(expected))
        seen[group.step] += 1
    assert not naive.images

    for step in swept.recorded:
        assert len(step.samples) == len(step.source_of)
        for prompt in range(PROMPTS):
            for row, sample in enumerate(step.samples):
                before, after, density = naive.recorded.pop((prompt, step.step, sample))
                close(step.sources[prompt, step.source_of[row]], before)
                close(step.next_latents[prompt, row], after)
                close(step.log_prob[prompt, row], density)
    assert not naive.recorded


G2RPO_CASES = [
    # (T, M, granularities)
    (10, None, (1, 2, 3)),
    (10, None, (1,)),
    (16, (0, 3, 14), (1, 2, 3)),
    (8, (0, 1, 2, 3), (1, 2, 3)),  # 2 and 3 coincide at k = 3
    (8, (6, 2), (2, 2, 5)),  # named twice, all coincide at the last step, not in order
    (2, (0,), (1, 4)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("steps", "chosen", "granularities"), G2RPO_CASES)
def test_g2rpo_equals_the_naive_loop(
    steps: int,
    chosen: tuple[int, ...] | None,
    granularities: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    method = g2rpo.G2RPO(eta=0.7, stochastic_steps=chosen, granularities=granularities)
    shape = RolloutShape(steps, 3, 10)
    tree, swept, _ = run(method, shape, dtype)
    naive = Naive(ToyTransformer(dtype), grid_of(steps).timesteps, 3, dtype)
    naive.g2rpo(0.7, tuple(range(steps // 2)) if chosen is None else chosen, granularities)
    compare(tree, swept, naive)
    anchor = swept.images[:, tree.images.index(tree.logged_images[0])]
    close(anchor, torch.stack(naive.anchors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_dance_grpo_equals_the_naive_loop(dtype: torch.dtype) -> None:
    tree, swept, _ = run(dance_grpo.DanceGRPO(eta=0.3), RolloutShape(16, 4, 10), dtype)
    naive = Naive(ToyTransformer(dtype), grid_of(16).timesteps, 4, dtype)
    naive.dance_grpo(0.3)
    compare(tree, swept, naive)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("iteration", "window"),
    [(0, (0, 1, 2, 3)), (25, (1, 2, 3, 4)), (150, (6, 7, 8, 9)), (300, (12, 13)), (325, (13,))],
)
def test_mix_grpo_equals_the_naive_loop(
    iteration: int, window: tuple[int, ...], dtype: torch.dtype
) -> None:
    shape = RolloutShape(16, 3, 400)
    tree, swept, _ = run(mix_grpo.MixGRPO(), shape, dtype, iteration=iteration)
    naive = Naive(ToyTransformer(dtype), grid_of(16).timesteps, 3, dtype)
    naive.mix_grpo(0.7, window)
    compare(tree, swept, naive)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shared", [True, False])
def test_flow_grpo_equals_the_naive_loop(shared: bool, dtype: torch.dtype) -> None:
    method = flow_grpo.FlowGRPO(shared_initial_noise=shared)
    tree, swept, _ = run(method, RolloutShape(10, 4, 10), dtype)
    naive = Naive(ToyTransformer(dtype), grid_of(10).timesteps, 4, dtype)
    naive.flow_grpo(0.7, shared=shared)
    compare(tree, swept, naive)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kernel", ["sde", "cps"])
@pytest.mark.parametrize(("contiguous", "shared"), [(True, True), (False, False)])
def test_flow_grpo_fast_equals_the_naive_loop(
    contiguous: bool, shared: bool, kernel: Kernel, dtype: torch.dtype
) -> None:
    method = flow_grpo_fast.FlowGRPOFast(
        kernel=kernel, contiguous=contiguous, shared_initial_noise=shared
    )
    shape = RolloutShape(10, 4, 10, seed=3)
    tree, swept, _ = run(method, shape, dtype, iteration=2)
    naive = Naive(ToyTransformer(dtype), grid_of(10).timesteps, 4, dtype)
    naive.fast(0.7, method.phase(shape, 2), cps=kernel == "cps", shared=shared)
    compare(tree, swept, naive)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_tempflow_grpo_equals_the_naive_loop(dtype: torch.dtype) -> None:
    tree, swept, _ = run(tempflow_grpo.TempFlowGRPO(eta=0.9), RolloutShape(6, 3, 10), dtype)
    naive = Naive(ToyTransformer(dtype), grid_of(6).timesteps, 3, dtype)
    naive.g2rpo(0.9, tuple(range(5)), (1,))
    compare(tree, swept, naive)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_branch_grpo_equals_the_naive_loop(scale: float, dtype: torch.dtype) -> None:
    method = branch_grpo.BranchGRPO(split_steps=(0, 2, 3), split_noise_scale=scale)
    tree, swept, model = run(method, RolloutShape(6, 8, 10), dtype)
    assert model.rows == swept.velocity_evaluations == PROMPTS * (1 + 2 * 2 + 4 + 2 * 8)
    naive = Naive(ToyTransformer(dtype), grid_of(6).timesteps, 8, dtype)
    naive.branch_grpo(0.3, (0, 2, 3), scale)
    assert [len(step.samples) for step in swept.recorded] == [2, 2, 4, 8, 8, 8]
    compare(tree, swept, naive)


def test_a_recorded_step_without_noise_is_refused() -> None:
    tree = RolloutTree(4)
    image = tree.trajectories(tree.initial_group(2, shared=True), range(4), range(4))
    tree.groups.append(Group(image))
    laws = transitions("cps", grid_of(4).sigmas, (0.8,) * 4)
    with pytest.raises(UserError, match="step 3 has no noise"):
        sweep(tree, grid_of(4), 1, ToyTransformer(torch.float32), noise, SweepSettings(laws, 8))


def test_the_toy_velocity_is_of_realistic_size_and_listens_to_everything() -> None:
    model = ToyTransformer(torch.float64)
    x = torch.stack([noise(0, sample, 3) for sample in range(32)])
    time, prompt = torch.full((32,), 0.6, dtype=torch.float64), torch.zeros(32, dtype=torch.long)
    with torch.no_grad():
        v = model(x, time, prompt)
        assert v.std() > 0.5
        assert (model(x, time - 0.3, prompt) - v).std() > 0.1
        assert (model(x, time, prompt + 1) - v).std() > 0.1
        assert (model(2 * x, time, prompt) - 2 * v).std() > 0.1


# --- batching ------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[], Method]] = {
    "g2rpo": lambda: g2rpo.G2RPO(granularities=(1, 2, 3)),
    "dance_grpo": dance_grpo.DanceGRPO,
    "mix_grpo": mix_grpo.MixGRPO,
    "flow_grpo": lambda: flow_grpo.FlowGRPO(shared_initial_noise=False),
    "flow_grpo_fast": lambda: flow_grpo_fast.FlowGRPOFast(kernel="cps"),
    "tempflow_grpo": tempflow_grpo.TempFlowGRPO,
    "branch_grpo": branch_grpo.BranchGRPO,
    "branch_grpo, scaled": lambda: branch_grpo.BranchGRPO(
        split_steps=(0, 3), split_noise_scale=4.0
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", METHODS)
def test_results_do_not_depend_on_the_micro_batch(name: str, dtype: torch.dtype) -> None:
    shape = RolloutShape(8, 4, 50)
    _, reference, _ = run(METHODS[name](), shape, dtype, iteration=10, micro_batch=64)
    for micro_batch in (1, 3, 7):
        _, other, model = run(METHODS[name](), shape, dtype, iteration=10, micro_batch=micro_batch)
        close(other.images, reference.images)
        assert other.velocity_evaluations == reference.velocity_evaluations == model.rows
        for a, b in zip(other.recorded, reference.recorded, strict=True):
            assert (a.step, a.samples, a.transition) == (b.step, b.samples, b.transition)
            close(a.sources, b.sources)
            close(a.next_latents, b.next_latents)
            close(a.log_prob, b.log_prob)


def test_micro_batches_are_of_the_chosen_size() -> None:
    sizes: list[int] = []

    def velocity(x: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        assert len(x) == len(time) == len(prompt)
        assert len(set(time.tolist())) == 1
        sizes.append(len(x))
        return torch.tanh(x)

    method, grid = dance_grpo.DanceGRPO(), grid_of(4)
    tree = method.rollout_tree(RolloutShape(4, 5, 1), 0)
    settings = SweepSettings(method.transitions(grid.sigmas), 4)
    swept = sweep(tree, grid, 2, velocity, noise, settings)
    # Node 0 has one shared state per prompt; the others have five.
    assert sizes == [2, 4, 4, 2, 4, 4, 2, 4, 4, 2]
    assert sum(sizes) == swept.velocity_evaluations == 32


# --- the number of velocity evaluations ----------------------------------------------------------


@pytest.mark.parametrize(
    ("granularities", "sweep_count", "naive_count"),
    [((1, 2, 3), 1708, 2188), ((1, 2), 1504, 1792), ((1,), 1120, 1216)],
)
def test_evaluations_of_the_paper_setting(
    granularities: tuple[int, ...], sweep_count: int, naive_count: int
) -> None:
    method, shape = g2rpo.G2RPO(granularities=granularities), RolloutShape(16, 12, 300)
    tree, swept, model = run(method, shape, torch.float32, prompts=1)
    assert tree.velocity_evaluations == sweep_count
    assert swept.velocity_evaluations == model.rows == sweep_count
    assert len(tree.images) == 8 * 12 * len(granularities) + 1  # and the anchor's, for the log

    tree, swept, model = run(method, shape, torch.float32, prompts=2)
    assert swept.velocity_evaluations == model.rows == 2 * sweep_count

    naive = Naive(ToyTransformer(torch.float32), grid_of(16).timesteps, 12, torch.float32)
    naive.g2rpo(0.7, tuple(range(8)), granularities)
    assert naive.model.rows == PROMPTS * naive_count


@pytest.mark.parametrize(
    ("method", "iteration", "expected"),
    [
        (dance_grpo.DanceGRPO(), 0, 1 + 15 * 12),
        (flow_grpo.FlowGRPO(), 0, 1 + 15 * 12),
        (flow_grpo.FlowGRPO(shared_initial_noise=False), 0, 16 * 12),
        (mix_grpo.MixGRPO(), 0, 1 + 15 * 12),
        (mix_grpo.MixGRPO(), 125, 6 + 10 * 12),
    ],
)
def test_evaluations_of_the_baselines(method: Method, iteration: int, expected: int) -> None:
    shape = RolloutShape(16, 12, 300)
    tree, swept, model = run(method, shape, torch.float32, iteration=iteration, prompts=1)
    assert tree.velocity_evaluations == swept.velocity_evaluations == model.rows == expected
    assert len(tree.images) == 12


def test_a_granularity_named_twice_is_evaluated_once_and_counted_twice() -> None:
    shape = RolloutShape(8, 3, 10)
    once, swept_once, _ = run(g2rpo.G2RPO(granularities=(1, 2)), shape, torch.float64)
    twice, swept_twice, _ = run(g2rpo.G2RPO(granularities=(1, 2, 2)), shape, torch.float64)
    assert swept_twice.velocity_evaluations == swept_once.velocity_evaluations
    assert torch.equal(swept_twice.images, swept_once.images)
    assert [g.granularity for g in once.groups] == [1, 2] * 4
    assert [g.granularity for g in twice.groups] == [1, 2, 2] * 4
    for index in range(4):
        assert twice.groups[3 * index + 1].images == twice.groups[3 * index + 2].images


# --- consistency with the training forward -------------------------------------------------------


def repeated_log_prob(step: RecordedStep, model: ToyTransformer, time: float) -> Tensor:
    """The training forward over one prompt's states, in the batch of the rollout."""
    states = step.sources.flatten(0, 1)
    prompts, per_prompt = step.sources.shape[:2]
    precision = torch.promote_types(states.dtype, torch.float32)
    times = states.new_full((len(states),), time, dtype=precision)
    prompt_of = torch.arange(prompts).repeat_interleave(per_prompt)
    mean = transition_mean(states, model(states, times, prompt_of), [step.transition] * len(states))
    mean = mean.view_as(step.sources)
    assert torch.equal(mean, step.means)
    mean = mean[:, step.source_of]
    after = step.next_latents
    std = per_state([step.transition.std], mean[0, :1])
    value = step.transition.log_prob(after.flatten(0, 1), mean.flatten(0, 1), std)
    return value.view(after.shape[:2])


@pytest.mark.parametrize("name", METHODS)
def test_the_ratio_is_exactly_one_when_the_forward_is_repeated(name: str) -> None:
    grid = grid_of(8)
    _, swept, model = run(METHODS[name](), RolloutShape(8, 4, 50), torch.float32)
    assert swept.recorded
    for step in swept.recorded:
        assert not step.log_prob.requires_grad
        again = repeated_log_prob(step, model, grid.timesteps[step.step])
        assert torch.equal(torch.exp(again - step.log_prob), torch.ones_like(again))


def test_the_log_prob_is_that_of_the_stored_latents() -> None:
    """In a coarse storage dtype, the density is that of the rounded x', not of what was rounded."""
    _, swept, _ = run(dance_grpo.DanceGRPO(), RolloutShape(6, 4, 10), torch.bfloat16)
    for step in swept.recorded:
        assert step.next_latents.dtype == step.sources.dtype == torch.bfloat16
    model, method, grid = ToyTransformer(torch.bfloat16), dance_grpo.DanceGRPO(), grid_of(6)
    settings = SweepSettings(method.transitions(grid.sigmas), 64, torch.bfloat16)
    again = sweep(method.rollout_tree(RolloutShape(6, 4, 10), 0), grid, 2, model, noise, settings)
    for a, b in zip(swept.recorded, again.recorded, strict=True):
        repeated = repeated_log_prob(a, model, grid.timesteps[a.step])
        assert torch.equal(a.next_latents, b.next_latents)
        assert torch.equal(repeated, a.log_prob)


# --- noise and misuse ----------------------------------------------------------------------------


def test_noise_is_asked_for_by_prompt_sample_and_step() -> None:
    asked: list[tuple[int, int, int]] = []

    def recording(prompt: int, sample: int, step: int) -> Tensor:
        asked.append((prompt, sample, step))
        return noise(prompt, sample, step)

    grid, method = grid_of(6), g2rpo.G2RPO(stochastic_steps=(1, 3), granularities=(1, 2))
    tree = method.rollout_tree(RolloutShape(6, 3, 10), 0)
    settings = SweepSettings(method.transitions(grid.sigmas), 8, torch.float64)
    sweep(tree, grid, 2, ToyTransformer(torch.float64), recording, settings)
    expected = {(p, 0, -1) for p in range(2)}
    expected |= {(p, s, k) for p in range(2) for s in range(3) for k in (1, 3)}
    assert len(asked) == len(expected)
    assert set(asked) == expected


def test_misuse_is_refused() -> None:
    tree = RolloutTree(4)
    root = tree.initial(0)
    with pytest.raises(ValueError, match="no step"):
        tree.ode(root, 0)
    with pytest.raises(ValueError, match="no step"):
        tree.ode(root, 5)
    image = tree.ode(root, 4)
    assert tree.ode(root, 4) == image
    tree.groups.append(Group((image,)))
    settings = SweepSettings((), 8)
    with pytest.raises(ValueError, match="4 steps, the grid 5"):
        sweep(tree, grid_of(5), 1, ToyTransformer(torch.float32), noise, settings)
