"""Seconds, bytes and schedules that a plan tells before anything is run."""

import itertools
import json
import time
from pathlib import Path

import pytest

from g2rpo.errors import UserError
from g2rpo.policy import LoraConfig
from g2rpo.policy.size import FLUX_DEV, model_size
from g2rpo.training.config import CheckpointConfig
from g2rpo.training.counts import training_counts
from reproduce.experiment import (
    ROOT,
    Experiment,
    Hardware,
    Profile,
    ResolvedCell,
    expand,
    load_experiment,
    load_profile,
    resolve,
)
from reproduce.jobs.estimates import (
    Estimate,
    _checkpoints,
    checkpoint_bytes,
    embedding_estimate,
    held_out_count,
    prompt_count,
    rendering_estimate,
    sampling_estimate,
    scoring_estimate,
    training_estimate,
)
from reproduce.jobs.schedule import Task, schedule_wall
from reproduce.jobs.speeds import KINDS, all_speeds, speeds_of
from reproduce.stages.shares import Share


def cell_of(profile: Profile, key: str = "hps/g2rpo") -> ResolvedCell:
    return resolve(load_experiment("table1"), profile, key, 1)


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
        profile = load_profile(name)
        operations = model_size(profile.policy).operations(profile.policy)
        assert speeds_of(profile).operations == pytest.approx(operations, rel=1e-9)
    other = load_profile("flux").model_copy(update={"name": "mine"})
    assert speeds_of(other).name == "h100-full"
    assert speeds_of(other).stands_in


# Training


def test_training_on_16_gpus_takes_a_16th_of_the_rollouts() -> None:
    profile = load_profile("flux")
    config = cell_of(profile).train
    assert config is not None
    speeds, counts = speeds_of(profile), training_counts(config)
    many = training_estimate(config, Hardware(gpus=16), speeds)
    one = training_estimate(config, Hardware(gpus=1), speeds)
    assert (many.gpus, one.gpus) == (16, 1)
    assert many.device_seconds == pytest.approx(16 * many.wall_seconds)
    alone = (one.wall_seconds - 16 * many.wall_seconds) / (1 - 16)
    assert 0 < alone < 0.1 * many.wall_seconds  # start, checkpoints, waiting
    # 300 iterations of one prompt a GPU: 1708 evaluations of 91 ms are 155 s.
    assert counts.rollout_evaluations == 300 * 16 * 1708
    assert 300 * 155 < many.wall_seconds < 300 * 220
    assert not many.measured  # sharded training was not


def test_another_resolution_is_scaled_and_told_as_not_measured() -> None:
    profile = load_profile("mini")
    config = cell_of(profile).train
    assert config is not None
    speeds = speeds_of(profile)
    assert training_estimate(config, profile.hardware, speeds).measured
    larger = config.model_copy(
        update={"policy": config.policy.model_copy(update={"resolution": 64})}
    )
    scaled = training_estimate(larger, profile.hardware, speeds)
    assert not scaled.measured
    size = model_size(config.policy)
    ratio = size.operations(larger.policy) / size.operations(config.policy)
    before = training_estimate(config, profile.hardware, speeds).wall_seconds
    assert 1.5 * before < scaled.wall_seconds < max(4, ratio) * before


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"every": 10, "keep_last": 1}, 3),
        ({"every": 50, "keep_last": 2, "keep_every": 50}, 6),
        ({"every": 10, "keep_last": 1, "keep_every": 100}, 5),
        ({"every": 1000}, 1),
        ({"every": 70, "keep_last": 2}, 3),
    ],
)
def test_checkpoints_at_a_time(settings: dict[str, int], most: int) -> None:
    assert _checkpoints(CheckpointConfig.model_validate(settings), 300)[0] == most


def test_a_checkpoint_of_flux_is_weights_and_two_moments() -> None:
    profile = load_profile("flux")
    config = cell_of(profile).train
    assert config is not None
    assert checkpoint_bytes(config) == 12 * FLUX_DEV.parameters
    adapters = config.model_copy(update={"lora": LoraConfig()})
    assert checkpoint_bytes(adapters) == 12 * 358_612_992


# Evaluation


def test_sampling_counts_every_velocity() -> None:
    cell = cell_of(load_profile("mini"))
    images = 400 + 40 * 3
    sampled = sampling_estimate(cell)
    assert sampled.evaluations == images * 20 + 32 * 5
    assert sampling_estimate(cell, reference=True).evaluations == sampled.evaluations + 32 * (
        20 + 5
    )
    assert sampling_estimate(cell_of(cell.profile, "base")).evaluations == images * 20
    assert scoring_estimate(cell).evaluations == 0


def test_shares_are_the_whole() -> None:
    cell = cell_of(load_profile("mini"))
    shares = [Share(index, 7) for index in range(7)]
    parts = [sampling_estimate(cell, share) for share in shares]
    assert sum(part.evaluations for part in parts) == sampling_estimate(cell).evaluations
    longest = max(part.wall_seconds for part in parts)
    assert longest < 0.35 * sampling_estimate(cell).wall_seconds
    scored = [scoring_estimate(cell, share).wall_seconds for share in shares]
    start = speeds_of(cell.profile).start["score"].seconds
    assert sum(scored) == pytest.approx(scoring_estimate(cell).wall_seconds + 6 * start)


def test_prompts_that_are_not_here_are_counted_by_the_catalogue() -> None:
    train, test = Path("data/hpdv2/train.txt"), Path("data/hpdv2/test.txt")
    assert (prompt_count(train), prompt_count(test)) == (103_365, 400)
    assert prompt_count(Path("data/hpdv2/nothing.txt")) is None
    cell = cell_of(load_profile("flux"))
    assert held_out_count(cell) == 400
    estimate = sampling_estimate(cell)
    assert estimate.evaluations == (400 + 50 * 3) * 50 + 32 * 5
    assert estimate.gpus == 1
    assert not estimate.measured  # at 1024 pixels
    changed = vars(cell) | {"evaluation_prompts": "nowhere.txt"}
    with pytest.raises(UserError, match=r"nowhere.txt: no such prompt file"):
        sampling_estimate(ResolvedCell(**changed))


def test_a_reward_that_nobody_timed_is_not_measured() -> None:
    profile = load_profile("mini")
    assert scoring_estimate(cell_of(profile)).measured
    other = profile.rewards["clip"].model_copy(update={"model": "mine"})
    more = profile.model_copy(update={"rewards": profile.rewards | {"mine": other}})
    known, unknown = scoring_estimate(cell_of(profile)), scoring_estimate(cell_of(more))
    assert unknown.wall_seconds > known.wall_seconds
    assert not unknown.measured


def test_embeddings() -> None:
    profile = load_profile("flux")
    estimate = embedding_estimate(1000, profile.policy, profile.hardware, speeds_of(profile))
    assert estimate.disk_bytes == 1000 * 2 * (512 * 4096 + 768)
    assert (estimate.gpus, estimate.measured) == (1, False)


def test_estimates_add_up() -> None:
    first, second = Estimate(10, 5, 2, 7, 100), Estimate(3, 3, 1, 0, 50, measured=False)
    both = Estimate(13, 8, 2, 7, 150, measured=False)
    assert first + second == Estimate.total([first, second]) == both
    assert Estimate.total([]) == Estimate()


# The whole


def test_schedules_of_small_graphs() -> None:
    tasks = {"a": Task(4), "b": Task(3), "c": Task(2), "d": Task(1, ["a", "b"])}
    assert schedule_wall(tasks, 1) == 10
    assert schedule_wall(tasks, 2) == 5  # a and then d, beside b and then c
    assert schedule_wall(tasks, 3) == 5
    assert schedule_wall(tasks, 3, start=2) == 7
    assert schedule_wall({}, 2, start=2) == 0
    chain = {"a": Task(1), "b": Task(1, ["a"]), "c": Task(1, ["b", "done before"])}
    assert schedule_wall(chain, 8) == 3
    wide = {"a": Task(2), "b": Task(3, slots=2), "c": Task(2)}
    assert schedule_wall(wide, 2) == 7  # c does not overtake b
    assert schedule_wall({"a": Task(1, slots=4)}, 2) == 1
    with pytest.raises(ValueError, match="circle"):
        schedule_wall({"a": Task(1, ["b"]), "b": Task(1, ["a"])}, 2)


def test_schedules_lie_between_the_bounds() -> None:
    durations = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    tasks = {str(n): Task(d, [str(n - 3)] if n >= 3 else []) for n, d in enumerate(durations)}
    walls = [schedule_wall(tasks, slots) for slots in (1, 2, 3, 8)]
    assert walls[0] == sum(durations)
    assert all(later <= before for before, later in itertools.pairwise(walls))
    assert walls[-1] == 13  # the longest chain: 4 and then 9
    for slots, wall in zip((1, 2, 3, 8), walls, strict=True):
        assert wall >= sum(durations) / slots


def predicted_wall(experiment: Experiment, profile: Profile, slots: int) -> float:
    speeds, hardware = speeds_of(profile), profile.hardware
    trained, sampled, scored = {}, {}, {}
    for cell in expand(experiment, profile, profile.seeds):
        name = f"{cell.key}/{cell.seed}"
        if cell.train is not None:
            trained[f"train/{name}"] = Task(
                training_estimate(cell.train, hardware, speeds).wall_seconds
            )
        seconds = sampling_estimate(cell, speeds=speeds).wall_seconds
        sampled[f"sample/{name}"] = Task(seconds, [f"train/{name}"])
        seconds = scoring_estimate(cell, speeds=speeds).wall_seconds
        scored[f"score/{name}"] = Task(seconds, [f"sample/{name}"])
    render = Task(rendering_estimate(speeds).wall_seconds, list(scored))
    tasks = {**trained, **sampled, **scored, "render": render}
    return schedule_wall(tasks, slots, start=speeds.process.seconds)


def test_make_mini_is_predicted() -> None:
    """6:55 minutes were measured with two workers on an idle machine of two cores."""
    wall = predicted_wall(load_experiment("table1"), load_profile("mini"), 2)
    assert wall == pytest.approx(415, rel=0.3)


def test_training_seconds_are_about_those_of_committed_runs() -> None:
    profile = load_profile("mini")
    speeds = speeds_of(profile).model_copy(update={"start": {}})
    predicted, measured = 0.0, 0.0
    for path in (ROOT / "results" / "mini" / "table1" / "cells").glob("*.json"):
        stated = json.loads(path.read_text())["cell"]
        if stated["seed"] is None:
            continue
        cell = resolve(load_experiment("table1"), profile, stated["row"], stated["seed"])
        assert cell.train is not None
        config = cell.train.model_copy(update={"validation": None})  # not in a run's own seconds
        predicted += training_estimate(config, profile.hardware, speeds).wall_seconds
        measured += stated["cost"]["device_seconds"]
    assert predicted == pytest.approx(measured, rel=0.3)


def test_thousands_of_cells_are_estimated_in_proportion() -> None:
    experiment, profile = load_experiment("table1"), load_profile("mini")
    speeds = speeds_of(profile)

    def estimated(seeds: int) -> float:
        """The CPU seconds that it takes."""
        cells = expand(experiment, profile, range(seeds))
        started = time.process_time()
        total = Estimate.total(
            itertools.chain.from_iterable(
                (
                    Estimate() if cell.train is None
                    else training_estimate(cell.train, profile.hardware, speeds),
                    sampling_estimate(cell, speeds=speeds),
                    scoring_estimate(cell, speeds=speeds),
                )
                for cell in cells
            )
        )  # fmt: skip
        assert total.evaluations > 10 * seeds * 10_000
        return time.process_time() - started

    estimated(1)  # what is read once
    assert estimated(400) < 40 * estimated(40)  # 10 in proportion; pairs of cells would give 100
