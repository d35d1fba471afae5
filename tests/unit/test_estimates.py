"""Seconds, bytes and wall times that a plan predicts."""

import json
from pathlib import Path

import pytest

from g2rpo.errors import UserError
from g2rpo.policy import LoraConfig
from g2rpo.policy.flux_size import FluxSize
from g2rpo.policy.size import model_size
from g2rpo.training.config import CheckpointConfig, TrainConfig
from g2rpo.training.counts import training_counts
from reproduce.commands.plan_display import KINDS, stage_estimates, wall_seconds
from reproduce.experiment import (
    ROOT,
    Hardware,
    Profile,
    ResolvedCell,
    expand,
    load_experiment,
    load_profile,
    resolve,
)
from reproduce.experiment.layout import Layout
from reproduce.jobs.estimates import Estimator, checkpoint_disk, held_out_count, prompt_count
from reproduce.jobs.plan import make_plan
from reproduce.jobs.speeds import all_speeds, speeds_of
from reproduce.stages.evaluation_files import Share
from slurm.graph import Needs, Stage


def estimator_of(profile: Profile, **hardware: int) -> Estimator:
    speeds = speeds_of(profile)
    if hardware:
        profile = profile.model_copy(update={"hardware": Hardware(**hardware)})
    return Estimator(profile, speeds)


def cell_of(profile: Profile, key: str = "hps/g2rpo") -> ResolvedCell:
    return resolve(load_experiment("table1"), profile, key, 1)


def training_of(profile: Profile) -> TrainConfig:
    config = cell_of(profile).train
    assert config is not None
    return config


def test_the_mini_world_s_speeds_are_those_of_the_committed_report() -> None:
    report = json.loads((ROOT / "results" / "speed" / "iteration-mini.json").read_text())
    (mini,) = (speeds for speeds in all_speeds() if speeds.name == "mini-cpu")
    constants = report["constants"]
    measured = {"evaluation": mini.evaluation, "decode": mini.decode, "hps": mini.score["hps"]}
    for name, speed in measured.items():
        assert speed.seconds == float(f"{constants[name]:.3g}")
        assert "iteration-mini.json" in speed.source


def test_speeds_were_measured_at_the_sizes_that_they_state() -> None:
    assert [set(speeds.start) <= set(KINDS) for speeds in all_speeds()] == [True] * 4
    for name in ("mini", "flux", "flux-lora"):
        policy = load_profile(name).policy
        operations = model_size(policy).operations(policy)
        assert speeds_of(load_profile(name)).operations == pytest.approx(operations, rel=1e-9)


@pytest.mark.parametrize(
    ("profile", "name"),
    [("flux", "h100-full"), ("flux-lora", "h100-lora"), ("mini", "mini-cpu"), ("smoke", None)],
)
def test_another_profile_has_the_speeds_of_the_nearest_machine(
    profile: str, name: str | None
) -> None:
    speeds = speeds_of(load_profile(profile).model_copy(update={"name": "mine"}))
    assert speeds.name == (name or "mini-cpu")
    assert speeds.stands_in


# Training


def test_training_on_16_gpus_takes_a_16th_of_the_rollouts() -> None:
    profile = load_profile("flux")
    config = training_of(profile)
    many = estimator_of(profile, gpus=16).train(config)
    one = estimator_of(profile, gpus=1).train(config)
    assert (many.devices, one.devices) == (16, 1)
    alone = (one.seconds - 16 * many.seconds) / (1 - 16)
    assert 0 < alone < 0.1 * many.seconds  # start, checkpoints, waiting
    # 300 iterations of one prompt a GPU: 1708 evaluations of 91 ms are 155 s.
    assert training_counts(config).rollout_evaluations == 300 * 16 * 1708
    assert 300 * 155 < many.seconds < 300 * 220
    assert not many.measured  # sharded training was not
    limited = config.model_copy(
        update={"optimization": config.optimization.model_copy(update={"max_device_seconds": 160})}
    )
    assert estimator_of(profile, gpus=16).train(limited).seconds == 10


def test_another_size_is_scaled_and_told_as_not_measured() -> None:
    profile = load_profile("mini")
    config, estimator = training_of(profile), estimator_of(profile)
    assert estimator.train(config).measured
    larger = config.model_copy(update={"policy": config.policy.model_copy(update={"height": 128})})
    scaled = estimator.train(larger)
    assert not scaled.measured
    size = model_size(config.policy)
    ratio = size.operations(larger.policy) / size.operations(config.policy)
    before = estimator.train(config).seconds
    assert 1.5 * before < scaled.seconds < max(4, ratio) * before
    square = config.policy.model_copy(update={"resolution": 64})  # of as many pixels
    same = estimator.train(config.model_copy(update={"policy": square}))
    assert same.seconds == pytest.approx(scaled.seconds)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"every": 10, "keep_last": 1}, 3),
        ({"every": 50, "keep_last": 2, "keep_every": 50}, 6),
        ({"every": 1000}, 1),
    ],
)
def test_checkpoints_at_a_time(settings: dict[str, int], most: int) -> None:
    config = training_of(load_profile("flux"))
    checkpoints = CheckpointConfig.model_validate(settings)
    kept: list[int] = []
    found = written = 0
    for iteration in range(1, 301):
        if iteration % checkpoints.every == 0 or iteration == 300:
            kept.append(iteration)
            found, written = max(found, len(kept)), written + 1
            kept = sorted(checkpoints.kept(kept))
    changed = config.model_copy(update={"checkpoints": checkpoints})
    assert checkpoint_disk(changed)[1:] == (found, written)
    assert found == most


def test_a_checkpoint_of_flux_is_weights_and_two_moments() -> None:
    config = training_of(load_profile("flux"))
    assert checkpoint_disk(config)[0] == 12 * FluxSize(guidance_embeds=True).parameters
    adapters = config.model_copy(update={"lora": LoraConfig()})
    assert checkpoint_disk(adapters)[0] == 12 * FluxSize(guidance_embeds=True).lora_parameters(
        LoraConfig()
    )


# Evaluation


def test_sampling_counts_every_velocity() -> None:
    profile = load_profile("mini")
    estimator, images = estimator_of(profile), 400 + 40 * 3
    assert estimator.sample(cell_of(profile)).count("evaluation") == images * 20 + 32 * 5
    assert estimator.sample(cell_of(profile, "base")).count("evaluation") == images * 20
    assert estimator.score(cell_of(profile)).count("evaluation") == 0


def test_shares_are_the_whole() -> None:
    profile = load_profile("mini")
    cell, estimator = cell_of(profile), estimator_of(profile)
    shares = [Share(index, 7) for index in range(7)]
    parts, whole = [estimator.sample(cell, share) for share in shares], estimator.sample(cell)
    assert sum(part.count("evaluation") for part in parts) == whole.count("evaluation")
    assert max(part.seconds for part in parts) < 0.35 * whole.seconds
    scored = [estimator.score(cell, share).seconds for share in shares]
    start = speeds_of(profile).start["score"].seconds
    assert sum(scored) == pytest.approx(estimator.score(cell).seconds + 6 * start)


def test_prompts_that_are_not_here_are_counted_by_the_catalogue() -> None:
    train, test = Path("data/hpdv2/train.txt"), Path("data/hpdv2/test.txt")
    assert (prompt_count(train), prompt_count(test)) == (103_365, 400)
    profile = load_profile("flux")
    cell = cell_of(profile)
    assert held_out_count(cell) == 400
    estimate = estimator_of(profile).sample(cell)
    assert estimate.count("evaluation") == (400 + 50 * 3) * 50 + 32 * 5
    assert (estimate.devices, estimate.measured) == (1, False)  # at 1024 pixels
    with pytest.raises(UserError, match=r"nowhere.txt: no such prompt file"):
        prompt_count(Path("nowhere.txt"))


def test_a_reward_that_nobody_timed_is_not_measured() -> None:
    profile = load_profile("mini")
    known = estimator_of(profile).score(cell_of(profile))
    other = profile.rewards["clip"].model_copy(update={"model": "mine"})
    more = profile.model_copy(update={"rewards": profile.rewards | {"mine": other}})
    unknown = estimator_of(more).score(cell_of(more))
    assert unknown.seconds > known.seconds
    assert (known.measured, unknown.measured) == (True, False)


def test_embeddings_are_of_every_prompt_that_is_sampled() -> None:
    profile = load_profile("flux")
    cells = expand(load_experiment("table1"), profile, (1, 2))
    estimate = estimator_of(profile).embed(cells)
    # 300 iterations of 16 prompts at two seeds, and 400 held out.
    assert estimate.count("text") == 2 * 300 * 16 + 400
    assert estimate.disk_bytes == estimate.count("text") * 2 * (512 * 4096 + 768)


# The whole


def stage(name: str, *needs: str, ranks: int = 1) -> Stage:
    return Stage(name=name, kind="train", label=name, needs=needs, resources=Needs(ranks))


def test_wall_time_is_the_longest_chain_or_the_work_of_all() -> None:
    stages = [stage("a"), stage("b"), stage("c"), stage("d", "a", "b", "done before")]
    seconds = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}
    walls = [wall_seconds(stages, seconds, slots) for slots in (1, 2, 3, None)]
    assert walls == [10, 5, 5, 5]
    assert wall_seconds([], {}, 2) == 0
    assert wall_seconds([stage("a", ranks=4), stage("b")], {"a": 2.0, "b": 2.0}, 2) == 3


def test_make_mini_is_predicted() -> None:
    """About 9 minutes were measured with two workers on two cores."""
    profile, experiment = load_profile("mini"), load_experiment("table1")
    nowhere = Layout(Path("nowhere/runs"), Path("nowhere/tables"))
    cells = expand(experiment, profile, profile.seeds)
    half = [cell for cell in cells if not cell.key.startswith("hps_clip/")]
    plan = make_plan(experiment, profile, half, nowhere)
    seconds = {name: estimate.seconds for name, estimate in stage_estimates(plan).items()}
    wall = wall_seconds(plan.graph.stages.values(), seconds, 2)
    assert wall + speeds_of(profile).process.seconds == pytest.approx(540, rel=0.3)


def test_training_seconds_are_about_those_of_committed_runs() -> None:
    profile = load_profile("mini")
    estimator = Estimator(profile, speeds_of(profile).model_copy(update={"start": {}}))
    predicted, measured = 0.0, 0.0
    for path in (ROOT / "results" / "mini" / "table1" / "cells").glob("*.json"):
        stated = json.loads(path.read_text())["cell"]
        if stated["seed"] is None:
            continue
        cell = resolve(load_experiment("table1"), profile, stated["row"], stated["seed"])
        assert cell.train is not None
        config = cell.train.model_copy(update={"validation": None})  # not in a run's own seconds
        predicted += estimator.train(config).seconds
        measured += stated["cost"]["device_seconds"]
    assert predicted == pytest.approx(measured, rel=0.3)
