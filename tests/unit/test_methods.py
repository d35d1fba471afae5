"""The methods: windows, trained steps, images, refusals, and how a method is found."""

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import pytest

import g2rpo.methods
from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import Group, RolloutTree
from g2rpo.flow.schedule import shifted_sigmas
from g2rpo.methods import dance_grpo, flow_grpo, flow_grpo_fast, mix_grpo, tempflow_grpo
from g2rpo.methods import g2rpo as granular
from g2rpo.methods.base import Method, RolloutShape, method_names, parse_method
from g2rpo.methods.presets import load_preset, preset_names

PAPER = RolloutShape(steps=16, group_size=12, iterations=300)


def recorded_steps(tree: RolloutTree) -> Counter[int]:
    return Counter(tree.states[state].node - 1 for state in tree.recorded)


# --- G2RPO ---------------------------------------------------------------------------------------


def test_g2rpo_defaults_are_the_paper_settings() -> None:
    method = granular.G2RPO()
    assert method.steps_of(16) == (0, 1, 2, 3, 4, 5, 6, 7)
    assert method.granularities == (1, 2, 3)
    assert method.eta == 0.7
    assert method.check(PAPER) == []


def test_dance_grpo_diffusion_is_constant() -> None:
    assert dance_grpo.DanceGRPO().diffusion((1.0, 0.8, 0.5, 0.0)) == (0.3,) * 3


def test_g2rpo_without_the_anchor_reward_scores_groups_alone() -> None:
    tree = granular.G2RPO(log_anchor_reward=False, granularities=(1,)).rollout_tree(PAPER, 0)
    assert tree.logged_images == []
    assert len(tree.images) == 8 * 12


@pytest.mark.parametrize(
    ("name", "of_eight", "of_five"),
    [
        ("first_half", (0, 1, 2, 3), (0, 1)),
        ("last_half", (4, 5, 6), (2, 3)),
        ("all", (0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3)),
        ("every_second", (0, 2, 4, 6), (0, 2)),
        ("first", (0,), (0,)),
        ("middle", (4,), (2,)),
        ("last", (6,), (3,)),
    ],
)
def test_g2rpo_steps_by_name(
    name: granular.NamedSteps, of_eight: tuple[int, ...], of_five: tuple[int, ...]
) -> None:
    for steps, expected in ((8, of_eight), (5, of_five)):
        method = granular.G2RPO(stochastic_steps=name, granularities=(1,))
        assert method.steps_of(steps) == expected
        method.check(RolloutShape(steps, 4, 10))
        tree = method.rollout_tree(RolloutShape(steps, 4, 10), iteration=0)
        assert recorded_steps(tree) == Counter(dict.fromkeys(expected, 4))


def test_an_unknown_name_of_steps_is_rejected_with_the_closest_match() -> None:
    with pytest.raises(UserError, match="did you mean 'first_half'") as caught:
        validate(granular.G2RPO, {"stochastic_steps": "first_haf"}, "here")
    assert "\n" not in str(caught.value)


def test_g2rpo_notes_coinciding_granularities() -> None:
    notes = granular.G2RPO().check(RolloutShape(8, 12, 300))
    assert len(notes) == 1
    assert "step 3" in notes[0]
    assert "2 and 3" in notes[0]
    assert len(granular.G2RPO(granularities=(1, 1)).check(PAPER)) == 8


# --- DanceGRPO -----------------------------------------------------------------------------------


def test_dance_grpo_trains_nine_of_the_first_fifteen_afresh_per_sample() -> None:
    method = dance_grpo.DanceGRPO()
    recorded = sorted(recorded_steps(method.rollout_tree(PAPER, 0)))
    assert recorded == list(range(15))  # the last transition is not even recorded
    chosen = {
        (iteration, prompt, sample): tuple(
            method.trained_steps(recorded, 42, iteration, (prompt, sample))
        )
        for iteration in range(4)
        for prompt in ("000000", "000001")
        for sample in range(12)
    }
    for steps in chosen.values():
        assert len(set(steps)) == len(steps) == 9
        assert set(steps) <= set(range(15))
        assert list(steps) == sorted(steps)
    assert len(set(chosen.values())) > 80  # of 96 draws from 5005 subsets
    again = method.trained_steps(recorded, 42, 2, ("000001", 7))
    assert tuple(again) == chosen[2, "000001", 7]
    assert tuple(method.trained_steps(recorded, 43, 2, ("000001", 7))) != tuple(again)


def test_dance_grpo_trains_every_step_equally_often() -> None:
    method, counts = dance_grpo.DanceGRPO(), Counter[int]()
    for sample in range(2000):
        counts.update(method.trained_steps(range(15), 0, 0, ("p", sample)))
    # 2000 draws at 0.6: standard deviation 22.
    assert set(counts) == set(range(15))
    assert all(abs(count - 1200) < 5 * 22 for count in counts.values())


# --- MixGRPO -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "size", "stride", "interval"),
    [(25, 4, 1, 25), (16, 4, 1, 3), (16, 4, 3, 1), (10, 2, 5, 2), (10, 4, 0, 1), (3, 4, 1, 1)],
)
def test_mix_grpo_window_slides_and_rolls_back(
    steps: int, size: int, stride: int, interval: int
) -> None:
    method = mix_grpo.MixGRPO(window_size=size, stride=stride, interval=interval)
    start = 0
    for iteration in range(20 * interval * steps // max(stride, 1)):
        if iteration and iteration % interval == 0:
            start += stride
            if start >= steps - 2:  # past the last trainable step
                start = 0
        window = [step for step in range(start, start + size) if step < steps - 2]
        shape = RolloutShape(steps, 4, 10_000)
        found = method.window(shape, method.phase(shape, iteration))
        assert list(found) == window
        assert window


@pytest.mark.parametrize(
    ("iterations", "interval"), [(300, 25), (60, 5), (36, 3), (24, 2), (12, 1), (3, 1)]
)
def test_mix_grpo_matched_interval_is_a_twelfth(iterations: int, interval: int) -> None:
    method, shape = mix_grpo.MixGRPO(interval=None), RolloutShape(25, 12, iterations)
    starts = [method.phase(shape, iteration) for iteration in range(iterations)]
    assert starts == [iteration // interval for iteration in range(iterations)]
    assert max(starts) == (11 if iterations >= 12 else iterations - 1)


# --- Flow-GRPO-Fast ------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "starts"), [(10, 3), (6, 1), (20, 8)])
def test_the_window_starts_anywhere_in_the_first_half(steps: int, starts: int) -> None:
    method = flow_grpo_fast.FlowGRPOFast()
    shape = RolloutShape(steps, 3, 2000, seed=7)
    windows = Counter(method.phase(shape, iteration) for iteration in range(2000))
    assert set(windows) == {(start, start + 1, start + 2) for start in range(starts)}
    # Five standard deviations of a count.
    expected, share = 2000 / starts, 1 - 1 / starts
    assert all(abs(n - expected) <= 5 * (expected * share) ** 0.5 for n in windows.values())
    tree = method.rollout_tree(shape, 11)
    assert recorded_steps(tree) == Counter(dict.fromkeys(method.phase(shape, 11), 3))
    other = RolloutShape(steps, 3, 2000, seed=8)
    changes = any(method.phase(shape, i) != method.phase(other, i) for i in range(50))
    assert changes == (starts > 1)


def test_scattered_steps_are_any_of_the_first_half() -> None:
    method = flow_grpo_fast.FlowGRPOFast(contiguous=False)
    shape = RolloutShape(10, 3, 500)
    found = {method.phase(shape, iteration) for iteration in range(500)}
    assert found == set(combinations(range(5), 3))


@pytest.mark.parametrize(
    ("steps", "settings", "key"),
    [
        (5, {}, "method.stochastic_count=3 is more than the first 2"),
        (6, {"among": 6}, "method.among=6: the last of 6"),
    ],
)
def test_flow_grpo_fast_refuses_impossible_settings(
    steps: int, settings: dict[str, int], key: str
) -> None:
    with pytest.raises(ValueError, match=key) as caught:
        flow_grpo_fast.FlowGRPOFast(**settings).check(RolloutShape(steps, 3, 10))
    assert "\n" not in str(caught.value)


def test_cps_refuses_more_noise_than_there_is() -> None:
    with pytest.raises(UserError, match="kernel cps; use 1 or less"):
        validate(flow_grpo.FlowGRPO, {"kernel": "cps", "eta": 1.2}, "here")


# --- TempFlow-GRPO -------------------------------------------------------------------------------


@pytest.mark.parametrize(("eta", "scale"), [(0.7, 2.25), (0.9, 1.73)])
def test_tempflow_weights_are_the_noise_and_average_one(eta: float, scale: float) -> None:
    method = tempflow_grpo.TempFlowGRPO(eta=eta)
    sigmas = shifted_sigmas(10, 3.0)
    laws = method.transitions(sigmas)[:9]
    weights = method.step_weights(laws)
    assert sum(weights) / 9 == pytest.approx(1)
    for step, weight in enumerate(weights):
        below = sigmas[1] if step == 0 else sigmas[step]
        g = eta * (sigmas[step] / (1 - below)) ** 0.5
        noise = g * (sigmas[step] - sigmas[step + 1]) ** 0.5
        assert weight / weights[0] == pytest.approx(noise / laws[0].std)
    fixed = method.model_copy(update={"weight_scale": scale}).step_weights(laws)
    assert fixed == pytest.approx([scale * law.std for law in laws])


# --- Flow form -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [granular.G2RPO, mix_grpo.MixGRPO, flow_grpo.FlowGRPO])
def test_flow_form_of_the_diffusion_and_everything_recorded_is_trained(
    config: type[Method],
) -> None:
    method = config()  # type: ignore[call-arg]
    assert method.diffusion((1.0, 0.8, 0.5, 0.0)) == pytest.approx((0.7 * 5**0.5, 1.4, 0.7))
    assert list(method.trained_steps([0, 2, 5], 1, 2, ("p", 3))) == [0, 2, 5]


# --- discovery -----------------------------------------------------------------------------------


def test_methods_are_the_files_of_the_package() -> None:
    coded = [
        "branch_grpo", "dance_grpo", "flow_grpo", "flow_grpo_fast", "g2rpo", "mix_grpo",
        "tempflow_grpo",
    ]  # fmt: skip
    assert method_names() == sorted([*coded, "ode"])  # a rollout without presets
    combined = {
        "flow_cps", "flow_dppo", "grpo_guard", "diffusion_nft", "awm", "dgpo", "mix_grpo_flash",
        "mix_grpo_flash_star",
    }  # fmt: skip
    assert set(preset_names()) == {*coded, *combined}
    for name in method_names():
        method = parse_method({"name": name})
        assert method.name == name
        assert type(method).__module__ == f"g2rpo.methods.{name}"
        assert parse_method(method) is method


@pytest.fixture
def add_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Writes ``my_method.py`` beside the methods; its class has the name that is given."""

    def add(name: str) -> None:
        (tmp_path / "my_method.py").write_text(
            "from typing import Literal\n"
            "from g2rpo.methods.g2rpo import G2RPO\n"
            "class MyMethod(G2RPO):\n"
            f"    name: Literal['{name}'] = '{name}'\n"
            "    bias: float = 0.0\n"
        )

    monkeypatch.setattr(g2rpo.methods, "__path__", [*g2rpo.methods.__path__, str(tmp_path)])
    yield add
    sys.modules.pop("g2rpo.methods.my_method", None)


def test_a_new_file_is_a_new_method(add_method: Callable[[str], None]) -> None:
    add_method("my_method")
    assert "my_method" in method_names()
    method = parse_method({"name": "my_method", "bias": 0.5})
    assert method.model_dump()["bias"] == 0.5


def test_a_method_named_otherwise_than_its_file_is_refused(
    add_method: Callable[[str], None],
) -> None:
    add_method("mymethod")
    with pytest.raises(UserError, match="has no method named 'my_method'"):
        parse_method({"name": "my_method"})
    with pytest.raises(UserError, match="'my_method' has no presets; write"):
        load_preset("my_method", "matched")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "g2rp"}, "did you mean 'g2rpo'"),
        ({"name": "dancegrpo"}, "did you mean 'dance_grpo'"),
        ({"name": "base"}, "no method 'base'"),
        ({"name": 3}, "no method '3'"),
        ({}, "expected a mapping with a name"),
        ("g2rpo", "expected a mapping with a name"),
    ],
)
def test_an_unknown_method_names_the_nearest(value: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_method(value)
    assert "\n" not in str(caught.value)


class Built(Method):
    """A method whose tree the test sets."""

    name: str = "built"

    def tree(self, shape: RolloutShape, phase: Any) -> RolloutTree:
        return cast(RolloutTree, TREES[self.name](RolloutTree(shape.steps), shape))


def _tree(
    tree: RolloutTree,
    shape: RolloutShape,
    *,
    samples: int = 3,
    until: int | None = None,
    step: int | None = None,
    recorded: Collection[int] = (0,),
) -> RolloutTree:
    images = tree.trajectories(tree.initial_group(samples, shared=True), (0, 1), recorded, until)
    tree.groups.append(Group(images, step))
    return tree


TREES: dict[str, Callable[[RolloutTree, RolloutShape], Any]] = {
    "sound": _tree,
    "nothing": lambda tree, shape: None,
    "other steps": lambda tree, shape: _tree(RolloutTree(shape.steps + 1), shape),
    "no groups": lambda tree, shape: tree,
    "two samples": partial(_tree, samples=2),
    "half-noised": partial(_tree, until=2),
    "other step": partial(_tree, step=1),
    "not credited": partial(_tree, step=0, recorded=(0, 1)),
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "returned NoneType; return a RolloutTree"),
        ("other steps", r"has 5 steps; build RolloutTree\(shape.steps\), here 4"),
        ("no groups", "has no groups; append a Group"),
        ("two samples", "has a group of 2 images; give one for each of the 3 samples"),
        ("half-noised", "compares states at node 2, which are no images; follow them to node 4"),
        ("other step", r"credits step 1 by a group, but records the steps \[0\]"),
        ("not credited", "records step 1, which no group credits"),
    ],
)
def test_a_tree_that_would_train_on_nonsense_is_refused(name: str, message: str) -> None:
    shape = RolloutShape(steps=4, group_size=3, iterations=10)
    assert Built(name="sound").rollout_tree(shape, 0).groups
    with pytest.raises(UserError, match=rf"^method {name}: Built.tree {message}"):
        Built(name=name).rollout_tree(shape, 0)
