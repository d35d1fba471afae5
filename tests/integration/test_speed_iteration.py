"""The benchmark of a whole iteration: all executions compute the same rewards."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from benchmarks.speed import iteration, plain_loop
from benchmarks.speed.original import Plan
from benchmarks.speed.sizes import SIZES, FluxShape, size_named, write_flux
from benchmarks.speed.stopwatch import CEILING_SIDE
from g2rpo.errors import UserError
from g2rpo.flow.transition import Transition
from g2rpo.methods.base import RolloutShape
from g2rpo.policy import PolicyConfig, load_policy

APP = Typer()
APP.command()(iteration.main)


def test_the_original_takes_as_many_evaluations_as_are_published() -> None:
    laws = (Transition(1.0, 0.5),) * 16
    for granularities, original, shared in (
        ((1,), 1216, 1120),
        ((1, 2), 1792, 1504),
        ((1, 2, 3), 2188, 1708),
    ):
        plan = Plan(tuple(range(8)), granularities, 12, laws)
        assert plan.evaluations == original
        method = iteration.G2RPO(granularities=granularities)
        assert method.rollout_tree(RolloutShape(16, 12, 300), 0).velocity_evaluations == shared
    assert Plan(tuple(range(8)), (1, 2, 3), 12, laws).images == 289


def test_all_executions_give_the_same_rewards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = SIZES["tiny"]
    monkeypatch.setitem(vars(size), "every_batched", 2)
    monkeypatch.setitem(CEILING_SIDE, "cpu", 64)
    done = CliRunner().invoke(
        APP, ["--size", "tiny", "--repeats", "1", "--output", str(tmp_path)], catch_exceptions=False
    )
    assert done.exit_code == 0
    result = json.loads((tmp_path / "iteration-tiny.json").read_text())
    original, batched, ours = result["executions"]
    assert done.output.splitlines()[-1] == f"ratio: {original['whole'] / ours['whole']:.2f}"
    tree = iteration.G2RPO(granularities=size.granularities).rollout_tree(
        RolloutShape(size.steps, size.group_size, 1), 0
    )
    assert ours["evaluations"] == tree.velocity_evaluations < original["evaluations"]
    for one, two in zip(result["executions"], result["all_weights"]["executions"], strict=True):
        assert two["evaluations"] == one["evaluations"] and two["reward_difference"] < 1e-4
    assert original["evaluations"] == original["run_evaluations"] == batched["evaluations"]
    assert None not in itertools.chain(*original["rewards"])
    # A part of the batched original is run, and the rest extrapolated.
    assert batched["run_evaluations"] < batched["evaluations"]
    rewards = list(itertools.chain(*batched["rewards"]))
    assert 0 < rewards.count(None) < len(rewards)
    assert batched["rollout_tflops"] == pytest.approx(
        result["operations"] * batched["evaluations"] / batched["seconds"]["rollout"] / 1e12
    )
    for execution in (original, batched):
        assert execution["reward_difference"] < 1e-4
        # One forward for each stochastic step: its samples share the state that they leave.
        assert execution["training_evaluations"] == ours["training_evaluations"] == 3
    assert torch.tensor(ours["rewards"]).std() > 1e-3
    assert ours["images"] == len(tree.images)
    whole, constants = result["all_weights"]["executions"][2], result["constants"]
    assert constants["evaluation"] == whole["seconds"]["rollout"] / whole["evaluations"]
    assert constants["hps"] == whole["seconds"]["reward"] / whole["images"]
    page = (tmp_path / "iteration-tiny.md").read_text()
    assert "| speedup | 1.00× |" in page and "commit" in page


def test_a_plain_loop_computes_our_iteration() -> None:
    result = plain_loop.measure(SIZES["tiny"], 1)
    assert max(result["reward_differences"].values()) < 2e-3  # pixels are rounded
    norms = list(result["gradient_norms"].values())
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-2)
    assert norms[0] > 0
    assert "plain loop" in plain_loop.report(result)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--size", "flx"], "flux"), (["--size", "flux"], "needs a GPU")]
)
def test_a_size_that_cannot_be_run(arguments: list[str], message: str) -> None:
    if message == "needs a GPU" and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    done = CliRunner().invoke(APP, arguments)
    assert type(done.exception).__name__ == "UserError"
    assert message in str(done.exception)


def test_a_random_pipeline_of_any_shape_is_one_that_loads(tmp_path: Path) -> None:
    shape = FluxShape(1, 1, 2, 32, 32, 64, 24, (8, 16, 16), 4)
    write_flux(tmp_path, shape, torch.device("cpu"))
    config = PolicyConfig(source=str(tmp_path), resolution=32, max_sequence_length=24)
    policy = load_policy(config, "cpu")
    conditioning = policy.encode(["a red circle"])
    latents = torch.randn(1, policy.image_tokens, 64)
    velocity = policy.velocity(latents, torch.ones(1), conditioning)
    assert velocity.shape == latents.shape and velocity.isfinite().all()
    assert policy.decode(velocity).shape == (1, 32, 32, 3)


def test_a_size_that_a_benchmark_lacks_is_refused() -> None:
    assert size_named("mini", ("mini", "tiny")) is SIZES["mini"]
    for name, known in (("huge", "flux, mini, tiny"), ("minni", "'mini'")):
        with pytest.raises(UserError, match=f"--size {name}: no such size; .*{known}"):
            size_named(name)
    with pytest.raises(UserError, match="--size flux: no such size; valid: mini, tiny"):
        size_named("flux", ("mini", "tiny"))
