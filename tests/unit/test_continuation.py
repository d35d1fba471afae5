"""Approximate continuations: exact where they must be, bounded where they may differ."""

import copy
import functools
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from torch import Tensor, nn

from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import RolloutTree
from g2rpo.flow.schedule import GridConfig, build_grid
from g2rpo.flow.sweep import Key, Sweep, SweepSettings, Velocities, sweep
from g2rpo.methods import g2rpo, mix_grpo
from g2rpo.methods.base import RolloutShape
from g2rpo.policy import Conditioning, LoraConfig, Policy, PolicyConfig, load_policy
from g2rpo.policy.config import ContinuationConfig
from g2rpo.policy.fp8 import Fp8Linear, quantise
from g2rpo.seeds import gaussian
from g2rpo.training.continuation import ContinuationPolicy, RolloutContinuations

SHAPE = RolloutShape(6, 3, 10)


@pytest.fixture
def policy(flux_folder: Path) -> Policy:
    config = PolicyConfig(source=str(flux_folder), resolution=32, max_sequence_length=32)
    return load_policy(config, "cpu")


def with_lora(policy: Policy) -> Policy:
    """The policy with adapters that are far from zero."""
    policy.add_lora(LoraConfig(rank=4, alpha=8), seed=1)
    for name, parameter in policy.transformer.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.2 * gaussian(parameter.shape, 2, "test-lora", name)
    return policy


def config_of(**fields: object) -> ContinuationConfig:
    return validate(ContinuationConfig, fields, "test")


PROMPTS = ["a red circle", "two blue squares above a green one"]
GRID = build_grid(GridConfig(steps=6), image_tokens=4)


def noise_for(policy: Policy, prompt: int, sample: int, step: int) -> Tensor:
    return policy.pack(gaussian(policy.latent_shape, 5, "test", prompt, sample, step)[None])[0]


class Exactly:
    """The policy's own velocity for the continuations, in the same batches."""

    reused, cache = 0, None

    def __init__(self, policy: Policy, conditioning: Conditioning) -> None:
        self.policy, self.conditioning = policy, conditioning

    def __call__(
        self, latents: Tensor, times: Tensor, prompts: Tensor, keys: Sequence[Key] = ()
    ) -> Tensor:
        return self.policy.velocity(latents, times, self.conditioning.select(prompts))

    def passed(self, node: int) -> None:
        pass


def walk(
    policy: Policy, tree: RolloutTree, config: ContinuationConfig | None, size: int = 5
) -> tuple[Sweep, Exactly | RolloutContinuations]:
    """A walk for two prompts in batches of ``size``; and what continued it."""
    conditioning = policy.encode(PROMPTS)
    settings = SweepSettings(g2rpo.G2RPO().transitions(GRID.sigmas), size)
    exact = Exactly(policy, conditioning)
    twin = nullcontext(exact)
    if config is not None:
        twin = ContinuationPolicy(policy, config).rollout(tree, conditioning)
    with twin as continuations:
        noise = functools.partial(noise_for, policy)
        return sweep(
            tree, GRID, 2, Velocities(exact, continuations), noise, settings
        ), continuations


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


# --- which states are exact ----------------------------------------------------------------------


def test_the_anchor_is_exact_and_what_follows_a_branch_is_not() -> None:
    tree = g2rpo.G2RPO(stochastic_steps=(1, 2), granularities=(1, 2)).rollout_tree(SHAPE, 0)
    exact = {state for state in range(len(tree.states)) if state in tree.policy_states}
    (anchor,) = tree.logged_images
    on_anchor = set()
    place = tree.states[anchor].parent
    while place is not None:
        on_anchor.add(place)
        place = tree.states[place].parent
    assert exact == on_anchor
    # Without a logged image the anchor is exact only as far as it is recorded.
    method = g2rpo.G2RPO(stochastic_steps=(0, 2), log_anchor_reward=False)
    tree = method.rollout_tree(SHAPE, 0)
    assert sorted(tree.states[state].node for state in tree.policy_states) == [0, 1, 2]


@pytest.mark.parametrize("ratio", [None, 0.9])
def test_of_mix_grpo_only_what_follows_the_window_is_a_continuation(ratio: float | None) -> None:
    shape = RolloutShape(8, 3, 100)
    tree = mix_grpo.MixGRPO(post_window_ratio=ratio).rollout_tree(shape, 0)
    last = max(tree.states[state].node for state in tree.recorded)
    for index, state in enumerate(tree.states):
        assert (index in tree.policy_states) == (state.node < last)


def test_every_state_is_evaluated_once_by_the_velocity_that_it_is_due() -> None:
    tree = g2rpo.G2RPO(stochastic_steps=(1, 3), granularities=(1, 2)).rollout_tree(SHAPE, 0)
    evaluated: dict[str, list[Key]] = {"exact": [], "continued": []}
    passed: list[float] = []

    class Continued:
        def __call__(
            self, latents: Tensor, times: Tensor, prompts: Tensor, keys: Sequence[Key]
        ) -> Tensor:
            assert prompts.tolist() == [prompt for prompt, _ in keys]
            evaluated["continued"] += keys
            return torch.tanh(latents)

        def passed(self, node: float) -> None:
            passed.append(node)

    def exact(latents: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
        evaluated["exact"] += [(int(prompt), -1) for prompt in prompts]
        return torch.tanh(latents)

    def noise(prompt: int, sample: int, step: int) -> Tensor:
        return gaussian((4, 6), 1, "test", prompt, sample, step)

    settings = SweepSettings(g2rpo.G2RPO().transitions(GRID.sigmas), 4)
    swept = sweep(tree, GRID, 2, Velocities(exact, Continued()), noise, settings)
    left = {state.parent for state in tree.states if state.parent is not None}
    continued = sorted(
        (prompt, state) for prompt in range(2) for state in left - tree.policy_states
    )
    assert sorted(evaluated["continued"]) == continued
    assert len(evaluated["exact"]) == 2 * len(left & tree.policy_states)
    assert swept.velocity_evaluations == 2 * len(left)
    assert passed == list(range(6))

    # The same function for both: the same as without a distinction, but for the batches.
    plain = sweep(tree, GRID, 2, lambda x, t, p: torch.tanh(x), noise, settings)
    assert torch.equal(plain.images, swept.images)


# --- each approximation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"merged_lora": True},
        {"fp8": True},
        {"merged_lora": True, "fp8": True},
        {"step_cache": {"threshold": 0.5}},
        {"step_cache": {"kind": "modulation", "threshold": 0.5}},
        {"fp8": True, "step_cache": {"threshold": 0.5}},
    ],
)
def test_an_approximation_changes_images_a_little_and_no_log_probability(
    policy: Policy, fields: dict[str, object]
) -> None:
    with_lora(policy)
    tree = g2rpo.G2RPO(granularities=(1, 2)).rollout_tree(SHAPE, 0)
    plain, _ = walk(policy, tree, None)
    swept, continuations = walk(policy, tree, config_of(**fields))
    for one, two in zip(plain.recorded, swept.recorded, strict=True):
        # Exact states are batched apart from the others: the last bits of sums may differ.
        torch.testing.assert_close(two.log_prob, one.log_prob, rtol=0, atol=2e-6)
        torch.testing.assert_close(two.next_latents, one.next_latents, rtol=0, atol=2e-5)
    (anchor,) = (tree.images.index(image) for image in tree.logged_images)
    torch.testing.assert_close(swept.images[:, anchor], plain.images[:, anchor], atol=2e-5, rtol=0)
    others = [place for place in range(len(tree.images)) if place != anchor]
    change = relative(swept.images[:, others], plain.images[:, others])
    assert change < 0.5
    if set(fields) == {"merged_lora"}:
        assert change < 1e-5
    else:
        assert change > 1e-4
    assert (continuations.reused > 0) == ("step_cache" in fields)
    assert swept.velocity_evaluations == plain.velocity_evaluations


@pytest.mark.parametrize("kind", ["first_block", "modulation"])
def test_a_cache_that_never_reuses_is_exact_and_is_empty_at_the_end(
    policy: Policy, kind: str
) -> None:
    tree = g2rpo.G2RPO(granularities=(1, 3)).rollout_tree(SHAPE, 0)
    expected, _ = walk(policy, tree, None)
    config = config_of(step_cache={"kind": kind, "threshold": 1e-9})
    swept, continuations = walk(policy, tree, config)
    assert continuations.reused == 0
    assert torch.equal(swept.images, expected.images)
    assert continuations.cache is not None
    assert not continuations.cache.entries


def test_a_cache_works_between_the_nodes_of_the_grid(policy: Policy) -> None:
    tree = mix_grpo.MixGRPO(window_size=2, post_window_ratio=0.9).rollout_tree(SHAPE, 0)
    assert any(state.node != int(state.node) for state in tree.states)
    plain, _ = walk(policy, tree, None)
    swept, continuations = walk(policy, tree, config_of(step_cache={"threshold": 2.0}))
    assert continuations.reused > 0 and continuations.cache is not None
    assert not continuations.cache.entries
    assert swept.velocity_evaluations == plain.velocity_evaluations
    assert relative(swept.images, plain.images) > 1e-4
    for one, two in zip(plain.recorded, swept.recorded, strict=True):
        torch.testing.assert_close(two.log_prob, one.log_prob, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["first_block", "modulation"])
def test_what_is_reused_does_not_depend_on_the_batch(policy: Policy, kind: str) -> None:
    tree = g2rpo.G2RPO(granularities=(1, 2)).rollout_tree(SHAPE, 0)
    config = config_of(step_cache={"kind": kind, "threshold": 0.5})
    (first, one), *others = (walk(policy, tree, config, size) for size in (1, 4, 64))
    assert one.reused > 0
    for swept, continuations in others:
        assert continuations.reused == one.reused
        torch.testing.assert_close(swept.images, first.images, atol=2e-5, rtol=0)


def test_merging_follows_the_adapters(policy: Policy) -> None:
    with_lora(policy)
    conditioning = policy.encode(["a red circle"])
    twin = ContinuationPolicy(policy, config_of(merged_lora=True))
    latents, times = noise_for(policy, 0, 0, 0)[None], torch.tensor([0.7])
    chosen = torch.zeros(1, dtype=torch.long)

    def change() -> tuple[Tensor, Tensor]:
        with twin.rollout(RolloutTree(4), conditioning) as continuations, torch.no_grad():
            merged = continuations(latents, times, chosen, [(0, 0)])
        with torch.no_grad():
            return merged, policy.velocity(latents, times, conditioning)

    first, expected = change()
    torch.testing.assert_close(first, expected, atol=2e-5, rtol=0)
    for name, parameter in policy.transformer.named_parameters():
        if ".lora_B." in name:
            parameter.data.mul_(-1)
    second, expected = change()
    torch.testing.assert_close(second, expected, atol=2e-5, rtol=0)
    assert relative(first, second) > 1e-2


def test_float8_follows_the_weights_and_leaves_the_policy_alone(policy: Policy) -> None:
    conditioning = policy.encode(["a red circle"])
    before = {name: p.clone() for name, p in policy.transformer.state_dict().items()}
    twin = ContinuationPolicy(policy, config_of(fp8=True))
    narrow = [m for m in twin.policy.transformer.modules() if isinstance(m, Fp8Linear)]
    assert len(narrow) == 2 * 12 + 2 * 5
    assert not any(isinstance(m, Fp8Linear) for m in policy.transformer.modules())
    latents, times = noise_for(policy, 0, 0, 0)[None], torch.tensor([0.7])
    chosen, found = torch.zeros(1, dtype=torch.long), []
    for _ in range(2):
        with twin.rollout(RolloutTree(4), conditioning) as continuations, torch.no_grad():
            found.append(continuations(latents, times, chosen, [(0, 0)]))
            expected = policy.velocity(latents, times, conditioning)
        assert 1e-4 < relative(found[-1], expected) < 0.1
        after = policy.transformer.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        with torch.no_grad():
            for parameter in policy.transformer.parameters():
                parameter.mul_(1.1)
        before = {name: p.clone() for name, p in policy.transformer.state_dict().items()}
    assert relative(found[1], found[0]) > 1e-2


def test_rows_keep_their_own_scale() -> None:
    rows = gaussian((8, 64), 3, "test") * torch.logspace(-6, 6, 8)[:, None]
    rounded, scale = quantise(rows)
    again = rounded.float() * scale
    # Three bits of mantissa: at most one part in 16, beside what lies far below a row's largest.
    error = (again - rows).abs()
    assert bool((error <= rows.abs() / 16 + rows.abs().amax(1, keepdim=True) * 2**-18).all())
    zero, scale = quantise(torch.zeros(2, 16))
    assert not (zero.float() * scale).any()


def test_a_float8_layer_is_near_its_layer_in_every_dtype() -> None:
    linear = nn.Linear(64, 48)
    inputs = gaussian((3, 5, 64), 4, "test")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = copy.deepcopy(linear).to(dtype)
        found = Fp8Linear(layer.weight, layer.bias)(inputs.to(dtype))
        assert found.dtype == dtype
        assert relative(found.float(), linear(inputs)) < 0.06


# --- misuse --------------------------------------------------------------------------------------


def test_misuse_is_refused(policy: Policy) -> None:
    with pytest.raises(UserError, match="approximate_rollout is empty"):
        config_of()
    with pytest.raises(UserError, match="threshold"):
        config_of(step_cache={"threshold": 0})
    with pytest.raises(UserError, match="needs lora"):
        ContinuationPolicy(policy, config_of(merged_lora=True))


def test_adapters_of_peft_itself_are_merged_too(policy: Policy) -> None:
    policy.transformer.add_adapter(PeftConfig(r=2, target_modules=["to_q"]))  # type: ignore[operator]
    ContinuationPolicy(policy, config_of(merged_lora=True))
