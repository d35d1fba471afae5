"""Profiles, presets and experiments: what a cell resolves to and what its run is called."""

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import small_profile_data
from hypothesis import given, settings
from hypothesis import strategies as st

from g2rpo import provenance
from g2rpo.config import merge, validate
from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import recorded_steps
from g2rpo.flow.schedule import build_grid
from g2rpo.methods.presets import load_preset, preset_names
from g2rpo.policy.config import ATTENTION_MODULES
from g2rpo.policy.size import nfe_per_velocity, pipeline_of
from g2rpo.training.config import GuidanceConfig, TrainConfig
from g2rpo.training.counts import iterations_within, training_counts, validations
from reproduce.experiment import (
    HERE,
    Experiment,
    Profile,
    ResolvedCell,
    expand,
    load_experiment,
    load_profile,
    resolve,
)
from reproduce.experiment import fingerprint as runs
from reproduce.experiment.table import ColumnConfig

EXPERIMENTS = sorted(path.stem for path in (HERE / "experiments").glob("*.yaml"))
PROFILES = sorted(path.stem for path in (HERE / "profiles").glob("*.yaml"))
SMALL_TABLE = {"title": "t", "columns": ["hps"]}
METHODS = preset_names()


def trained(cell: ResolvedCell) -> TrainConfig:
    assert cell.train is not None
    return cell.train


# Others read changed files.
bundled_experiment, bundled_profile = map(functools.cache, (load_experiment, load_profile))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_resolves_under_every_profile(experiment: str, profile: str) -> None:
    loaded, chosen = bundled_experiment(experiment), bundled_profile(profile)
    if loaded.policy is not None and loaded.policy != chosen.policy.source:
        fitting = "sd35" if experiment == "released-sd35" else "flux"
        with pytest.raises(
            UserError, match=f"needs the policy {loaded.policy}.*profile {fitting}$"
        ):
            expand(loaded, chosen, [1])
        return
    overrides: dict[str, Any] = {}
    if experiment == "released-vs-matched" and profile in ("sd35", "sd35-tiny"):
        with pytest.raises(UserError, match=r"not supported with lora.* lora=null"):
            expand(loaded, chosen, [1])
        overrides = {"lora": None}
    cells = expand(loaded, chosen, [1, 2], overrides)
    keys = [(cell.key, cell.seed) for cell in cells]
    assert len(set(keys)) == len(keys)
    for cell in cells:
        assert cell.train is None or cell.preset == (loaded.cells[cell.key].preset or "matched")


def test_matched_cells_differ_only_in_what_is_the_method() -> None:
    profile = load_profile("mini").model_copy(update={"learning_rates": {}})
    cells = expand(load_experiment("table1"), profile, [5])
    configs = [trained(cell).model_dump(exclude={"method"}) for cell in cells if cell.train]
    for rewards in ({"hps"}, {"hps", "clip"}):
        same = [config for config in configs if set(config["rewards"]) == rewards]
        assert len(same) == 5
        assert all(config == same[0] for config in same)


def test_in_domain_columns_come_from_the_cells() -> None:
    rows = {row.key: row for row in load_experiment("table1").table_spec(load_profile("mini")).rows}
    assert (rows["base"].train, rows["hps/g2rpo"].train) == ((), ("hps",))
    assert rows["hps_clip/dance_grpo"].train == ("hps", "clip")


# The released settings as the methods' own scripts have them.
RELEASED: dict[str, dict[str, Any]] = {
    "g2rpo": {
        "grid.steps": 16, "rollout.group_size": 12, "optimization.learning_rate": 2e-6,
        "optimization.iterations": 301, "optimization.update_every": "timestep",
        "method.granularities": (1, 2), "method.eta": 0.7,
        "method.stochastic_steps": tuple(range(8)), "rollout.prompts_per_iteration": 16,
    },
    "dance_grpo": {
        "grid.steps": 16, "rollout.group_size": 12, "optimization.learning_rate": 1e-5,
        "optimization.iterations": 300, "optimization.updates_per_iteration": 3,
        "method.eta": 0.3, "rollout.prompts_per_iteration": 16,
    },
    "mix_grpo": {
        "grid.steps": 25, "rollout.group_size": 12, "optimization.learning_rate": 1e-5,
        "optimization.updates_per_iteration": 4, "method.window_size": 4, "method.interval": 25,
        "advantage.combination": "normalized_weights", "rollout.prompts_per_iteration": 32,
    },
    "mix_grpo_flash": {
        "method.name": "mix_grpo", "method.post_window_ratio": 0.4, "method.interval": 20,
        "method.stride": 1, "grid.steps": 25, "optimization.updates_per_iteration": 4,
    },
    "mix_grpo_flash_star": {
        "method.name": "mix_grpo", "method.post_window_ratio": 0.2, "method.stride": 0,
        "method.window_size": 4, "grid.steps": 25, "optimization.updates_per_iteration": 4,
    },
    "flow_grpo": {
        "grid.steps": 10, "rollout.group_size": 24, "optimization.learning_rate": 3e-4,
        "optimization.kl_coefficient": 0.04, "advantage.normalizer": "global_std",
        "advantage.ddof": 0, "advantage.epsilon": 1e-4, "method.shared_initial_noise": False,
        "rollout.prompts_per_iteration": 48, "optimization.updates_per_iteration": 2,
    },
    "flow_grpo_fast": {
        "method.name": "flow_grpo_fast", "method.kernel": "sde", "method.stochastic_count": 3,
        "grid.schedule": "flux_dynamic", "grid.steps": 6, "optimization.kl_coefficient": 0.0,
        "advantage.normalizer": "global_std",
        "optimization.clip_range": 1e-5,
    },
    "flow_cps": {
        "method.name": "flow_grpo_fast", "method.kernel": "cps", "method.eta": 0.8,
        "method.stochastic_count": 3, "grid.steps": 6, "optimization.kl_coefficient": 0.0,
        "grid.schedule": "flux_dynamic",
        "advantage.normalizer": "global_std", "optimization.clip_range": 1e-5,
    },
    "grpo_guard": {
        "method.name": "flow_grpo", "objective.name": "guard", "objective.published": "verl_omni",
        "optimization.clip_range": 2e-6,
    },
    "flow_dppo": {
        "method.name": "flow_grpo_fast", "method.contiguous": False, "objective.name": "dppo",
        "objective.threshold": 1e-5, "rollout.group_size": 16, "grid.steps": 10,
        "optimization.updates_per_iteration": 2, "optimization.weight_decay": 0.0,
    },
    "branch_grpo": {
        "grid.steps": 20, "rollout.group_size": 16, "method.split_steps": (0, 3, 6, 9),
        "method.eta": 0.3, "optimization.clip_range": 1e-3, "optimization.iterations": 300,
        "optimization.learning_rate": 1e-5, "rollout.prompts_per_iteration": 16,
    },
    "diffusion_nft": {
        "method.solver": "dpm2m", "objective.name": "nft", "objective.beta": 1.0,
        "objective.old.limit": 0.5, "rollout.group_size": 24, "rollout.prompts_per_iteration": 48,
        "advantage.normalizer": "global_std", "optimization.kl_coefficient": 1e-4,
        "optimization.updates_per_iteration": 1, "grid.steps": 10,
    },
    "awm": {
        "objective.name": "awm", "objective.surrogate": "ghuber", "objective.old.limit": 0.3,
        "grid.steps": 14, "objective.times.count": 6, "optimization.clip_range": 1.0,
        "optimization.kl_coefficient": 1e-4, "rollout.prompts_per_iteration": 24,
    },
    "dgpo": {
        "objective.name": "dgpo", "objective.beta": 100.0, "objective.times.count": 4,
        "objective.times.shared_noise": True, "objective.old.rollouts_after": 200,
        "rollout.group_size": 16, "rollout.prompts_per_iteration": 8, "grid.timestep": "truncated",
        "optimization.clip_range": 1e-2, "optimization.kl_coefficient": 0.02,
    },
    "tempflow_grpo": {
        "method.weight_scale": 1.73, "method.eta": 0.9, "rollout.group_size": 6, "grid.steps": 10,
        "grid.schedule": "flux_dynamic",
        "advantage.ddof": 0, "optimization.kl_coefficient": 0.004,
        "optimization.iterations": 250,
    },
}  # fmt: skip


def released_cell(method: str, profile: str) -> ResolvedCell:
    experiment = load_experiment("table1")
    row = experiment.cells["hps/g2rpo"].model_copy(update={"method": method})
    released = experiment.model_copy(update={"preset": "released", "cells": {"row": row}})
    return resolve(released, load_profile(profile), "row", 42)


def setting(config: TrainConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


@pytest.mark.parametrize("method", METHODS)
def test_released_presets_state_the_released_settings(method: str) -> None:
    cell = released_cell(method, "mini")
    assert cell.preset == "released"
    for key, expected in RELEASED[method].items():
        assert setting(trained(cell), key) == expected, key
    optimization = trained(cell).optimization
    assert optimization.clip_range == RELEASED[method].get("optimization.clip_range", 1e-4)
    assert optimization.weight_decay == RELEASED[method].get("optimization.weight_decay", 1e-4)
    assert optimization.max_grad_norm == 1.0


# What the methods' own code has for SD3.5-M, where it is not what RELEASED has.
GUIDED = {
    "policy.guidance_scale": 4.5, "trained_policy.guidance_scale": 4.5, "grid.schedule": "sd3",
    "grid.steps": 10, "optimization.learning_rate": 3e-4, "lora.rank": 32, "lora.alpha": 64.0,
    "lora.target_modules": ATTENTION_MODULES,
}  # fmt: skip
UNGUIDED = GUIDED | {"policy.guidance_scale": 1.0, "trained_policy.guidance_scale": 1.0}
RELEASED_ON_SD35: dict[str, dict[str, Any]] = {
    "flow_grpo": GUIDED | {"grid.timestep": "exact"},
    "flow_grpo_fast": GUIDED | {
        "method.eta": 0.8, "method.stochastic_count": 2, "method.among": 9,
        "rollout.group_size": 24, "rollout.prompts_per_iteration": 48,
    },
    "flow_cps": UNGUIDED | {"rollout.group_size": 18, "rollout.prompts_per_iteration": 64},
    "grpo_guard": GUIDED | {
        "optimization.learning_rate": 1e-4, "advantage.normalizer": "group", "advantage.ddof": 0,
        "optimization.kl_coefficient": 0.0, "rollout.group_size": 24,
    },
    "flow_dppo": UNGUIDED | {"grid.schedule": "shifted", "method.stochastic_count": 3},
    "tempflow_grpo": GUIDED | {
        "method.eta": 0.7, "method.weight_scale": 2.25, "optimization.kl_coefficient": 0.001,
        "optimization.iterations": 1000,
    },
    "diffusion_nft": UNGUIDED | {"grid.timestep": "truncated"},
    "awm": UNGUIDED | {"grid.steps": 14},
    "dgpo": GUIDED | {
        "trained_policy.guidance_scale": 1.0, "grid.schedule": "shifted", "lora.rank": 64,
        "lora.alpha": 128.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("method", RELEASED_ON_SD35)
def test_released_presets_are_those_of_sd35_on_it(method: str) -> None:
    config = trained(released_cell(method, "sd35-lora"))
    for key, expected in (RELEASED[method] | RELEASED_ON_SD35[method]).items():
        assert setting(config, key) == expected, key
    assert config.policy.resolution == 512
    grid = build_grid(config.grid, image_tokens=1024).sigmas
    if config.grid.schedule == "sd3" and len(grid) == 11:
        published = (1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.0089, 0)
        assert grid == pytest.approx(published, abs=5e-4)
    if config.method.name == "flow_grpo":
        steps = recorded_steps(config.method.rollout_tree(config.shape, 0))
        assert list(steps) == list(range(9))


def test_released_presets_are_the_same_on_every_other_policy() -> None:
    for method in METHODS:
        flux = trained(released_cell(method, "flux"))
        plain = load_preset(method, "released")
        assert flux.lora is None and flux.guidance == GuidanceConfig()
        assert flux.grid.schedule == plain["grid"]["schedule"] != "sd3"
        assert flux.policy.guidance_scale == 3.5
        assert (method in RELEASED_ON_SD35) == (
            load_preset(method, "released", "StableDiffusion3Pipeline") != plain
        )


def test_a_preset_is_that_of_the_pipeline_before_and_after_it_is_built(
    smoke_assets: Path, tmp_path: Path
) -> None:
    profile, folder = tmp_path / "profile.yaml", tmp_path / "policy"
    profile.write_text(f"name: later\nextends: sd35-smoke\npolicy: {{source: {folder}}}\n")
    before = trained(released_cell("flow_grpo", str(profile)))
    assert before.lora is not None and nfe_per_velocity(before.policy) == 2
    shutil.copytree(smoke_assets / "sd3_policy", folder)
    assert trained(released_cell("flow_grpo", str(profile))) == before
    assert nfe_per_velocity(before.policy) == 2
    assert nfe_per_velocity(load_profile("sd35-lora").policy) == 2


def test_the_evaluation_of_sd35_is_that_of_flow_grpo() -> None:
    for name in ("sd35", "sd35-lora"):
        cell = resolve(load_experiment("table1"), load_profile(name), "hps/flow_grpo", 1)
        evaluation = cell.evaluation
        assert (evaluation.grid.steps, evaluation.grid.schedule) == (40, "sd3")
        assert (evaluation.resolution, cell.policy.guidance_scale) == (512, 4.5)
        assert trained(cell).lora is None or trained(cell).lora == trained(
            released_cell("flow_grpo", name)
        ).lora  # fmt: skip


RATES = {"g2rpo": 0.125, "g2rpo_no_mgai": 0.25}


def test_tuned_learning_rates_apply_to_matched_alone() -> None:
    profile = load_profile("mini").model_copy(update={"learning_rates": RATES})
    experiment = load_experiment("table1")
    assert trained(resolve(experiment, profile, "hps/g2rpo", 1)).optimization.learning_rate == 0.125
    other = resolve(experiment, profile, "hps/g2rpo_no_mgai", 1)
    assert trained(other).optimization.learning_rate == 0.25
    other = resolve(experiment, profile, "hps/dance_grpo", 1)
    assert trained(other).optimization.learning_rate == 3e-5
    released = experiment.model_copy(update={"preset": "released"})
    assert trained(resolve(released, profile, "hps/g2rpo", 1)).optimization.learning_rate == 2e-6


def test_features_come_from_a_judge_of_the_profile() -> None:
    experiment, profile = load_experiment("table1"), load_profile("mini")
    section = {"diversity": {"prompts": 2, "images": 2, "features": "clib"}}
    changed = {"base": experiment.cells["base"].model_copy(update={"evaluation": section})}
    wrong = experiment.model_copy(update={"cells": changed})
    with pytest.raises(UserError, match=r"diversity.features: .* no reward 'clib'.*'clip'"):
        resolve(wrong, profile, "base", 0)
    section = {"diversity": None, "drift": None}
    changed = {"base": experiment.cells["base"].model_copy(update={"evaluation": section})}
    without = resolve(experiment.model_copy(update={"cells": changed}), profile, "base", 0)
    assert without.evaluation.diversity is None
    assert resolve(experiment, profile, "base", 0).evaluation.drift is not None


def test_a_profile_extends_another(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\nextends: mini\nseeds: [7]\nevaluation: {limit: 3}\n")
    profile, mini = load_profile(str(mine)), load_profile("mini")
    assert profile.seeds == (7,)
    assert profile.evaluation == mini.evaluation.model_copy(update={"limit": 3})
    assert profile.rewards == mini.rewards
    mine.write_text(f"name: mine\nextends: {mine}\n")
    with pytest.raises(UserError, match="extends itself"):
        load_profile(str(mine))


@pytest.mark.parametrize("name", ["flux-8gpu", "flux-lora", "flux-lora-40gb"])
def test_the_profiles_of_flux_differ_in_their_engine_alone(name: str) -> None:
    other, flux = load_profile(name), load_profile("flux")
    assert other.policy == flux.policy
    assert other.evaluation == flux.evaluation
    assert other.rewards == flux.rewards
    changed = {key for key in other.training if other.training[key] != flux.training.get(key)}
    assert changed <= {"lora", "execution", "optimization"}
    assert other.training["rollout"] == flux.training["rollout"]
    assert ("lora" in other.training) == (other.engine == "lora")


@pytest.mark.parametrize("name", ["flux", "sd35"])
def test_a_tiny_profile_takes_the_path_of_its_model_on_the_cpu(name: str) -> None:
    tiny, whole = load_profile(f"{name}-tiny"), load_profile(name)
    assert tiny.engine == whole.engine == "sharded"
    assert tiny.hardware.training_ranks == 2
    assert tiny.policy.dtype == whole.policy.dtype
    assert pipeline_of(tiny.policy) == pipeline_of(whole.policy)
    assert tiny.training["execution"]["sharding"] == whole.training["execution"]["sharding"]


def test_what_a_run_has_not_leaves_its_name(smoke_assets: Path) -> None:
    local = Profile.model_validate(small_profile_data(smoke_assets))
    plain = name_of(local)
    for setting in (
        {"lora": None}, {"approximate_rollout": None}, {"optimization": {"optimizer": "adamw"}},
    ):  # fmt: skip
        assert name_of(local, **setting) == plain
    engine = {
        "sharding": "fsdp2", "gradient_checkpointing": True, "offload": {"rewards": True},
        "rollout_micro_batch": "auto", "compile": True, "attention": "math",
    }  # fmt: skip
    assert name_of(local, execution=engine) == plain
    names = {
        name_of(local, **setting)
        for setting in (
            {"lora": {}}, {"lora": {"rank": 4}}, {"optimization": {"optimizer": "adamw_8bit"}},
            {"approximate_rollout": {"fp8": True}},
            {"approximate_rollout": {"step_cache": {"threshold": 0.1}}},
            {"lora": {}, "approximate_rollout": {"merged_lora": True}},
        )
    }  # fmt: skip
    assert len(names | {plain}) == 7


def test_what_cells_share_does_not_mix_them() -> None:
    experiment, profile = load_experiment("table1"), load_profile("mini")
    for overrides in ({}, {"policy": {"dtype": "float64"}}):
        together = expand(experiment, profile, [1, 2], overrides)
        assert together == [
            resolve(experiment, profile, cell.key, cell.seed or 0, overrides) for cell in together
        ]
        assert {trained(c).seed for c in together if c.train} == {1, 2}
    weights = {"rewards": {"hps": {"weight": 2.0}, "clip": {"weight": 3.0}}}
    plain, both = (
        trained(resolve(experiment, profile, "hps_clip/g2rpo", 1, overrides)).rewards
        for overrides in ({}, weights)
    )
    assert {name: term.weight for name, term in both.items()} == {"hps": 2.0, "clip": 3.0}
    assert both["hps"].reward == plain["hps"].reward


def test_a_reward_that_is_not_registered_is_told_where_it_is_trained_on() -> None:
    experiment, profile = load_experiment("table1"), load_profile("mini")
    unknown = profile.rewards["clip"].model_copy(update={"model": "clipp"})
    changed = profile.model_copy(update={"rewards": profile.rewards | {"clip": unknown}})
    assert resolve(experiment, changed, "hps/g2rpo", 1).train is not None
    with pytest.raises(UserError, match=r"^table1, cell hps_clip/g2rpo: .*'clip'") as caught:
        resolve(experiment, changed, "hps_clip/g2rpo", 1)
    assert "\n" not in str(caught.value)


def name_of(profile: Profile, **changes: Any) -> str:
    cell = resolve(load_experiment("table1"), profile, "hps/g2rpo", 1, merge({}, changes))
    provenance._folder_hash.cache_clear()
    return runs.train_run_name(trained(cell))


def test_the_run_name_depends_on_what_determines_the_weights(
    smoke_assets: Path, tmp_path: Path
) -> None:
    shutil.copytree(smoke_assets, tmp_path / "assets")
    local = Profile.model_validate(small_profile_data(tmp_path / "assets"))
    name = name_of(local)
    assert name == name_of(local)
    assert name == name_of(local, execution={"rollout_micro_batch": 3, "device": "cpu"})
    assert name == name_of(local, checkpoints={"every": 7})
    assert name != name_of(local, optimization={"learning_rate": 0.25})
    assert name != name_of(local, method={"eta": 0.8})
    prompts = Path(local.prompts.train)
    lines = prompts.read_text()
    prompts.write_text(lines + "one more prompt\n")
    assert name != name_of(local)
    prompts.write_text(lines)
    assert name == name_of(local)
    (tmp_path / "assets").rename(tmp_path / "moved")
    text = local.model_dump_json().replace(str(tmp_path / "assets"), str(tmp_path / "moved"))
    moved = Profile.model_validate_json(text)
    assert name == name_of(moved)
    config = Path(moved.policy.source) / "transformer" / "config.json"
    config.write_text(config.read_text() + " ")
    assert name != name_of(moved)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="table1"):
        load_experiment("tabel1")
    with pytest.raises(UserError, match="smoke"):
        load_profile("smok")
    with pytest.raises(UserError, match="no preset 'tuned'"):
        load_preset("g2rpo", "tuned")


# --- budgets -------------------------------------------------------------------------------------


def test_equal_evaluations_are_as_many_as_fit() -> None:
    experiment, profile = load_experiment("equal-cost"), load_profile("mini")
    configs = {
        key: trained(resolve(experiment, profile, key, 1))
        for key, cell in experiment.cells.items()
        if cell.method is not None
    }
    budget = training_counts(configs["evaluations/dance_grpo"]).rollout_evaluations
    for key, config in configs.items():
        if not key.startswith("evaluations/"):
            assert config.optimization.max_device_seconds == profile.device_seconds
            continue
        assert config.optimization.max_device_seconds is None
        more = merge(
            config.model_dump(mode="json"),
            {"optimization": {"iterations": config.optimization.iterations + 1}},
        )
        assert training_counts(config).rollout_evaluations <= budget
        assert training_counts(TrainConfig.model_validate(more)).rollout_evaluations > budget
    assert configs["evaluations/flow_grpo"].optimization.iterations == 100
    assert configs["evaluations/mix_grpo"].optimization.iterations > 100
    assert configs["evaluations/g2rpo"].optimization.iterations < 40


def test_equal_cost_is_known_before_or_limits_the_run() -> None:
    experiment, profile = load_experiment("frontier"), load_profile("mini")
    reference = trained(resolve(experiment, profile, "hps/dance_grpo", 1))
    budget = training_counts(reference).equal_cost_evaluations
    validated = validations(reference.validation, reference.optimization.iterations)
    for key, cell in experiment.cells.items():
        if cell.budget is None:
            continue
        config = trained(resolve(experiment, profile, key, 1))
        settings = config.optimization
        more = settings.model_copy(update={"iterations": settings.iterations + 1})
        longer = config.model_copy(update={"optimization": more})
        costs = [training_counts(one).equal_cost_evaluations for one in (config, longer)]
        assert costs[0] <= budget < costs[1]
        # The cheapest rollout has the most iterations; the limit ends a run with dearer ones.
        assert settings.max_equal_cost == (budget if "adaptive" in key else None)
        points = validations(config.validation, settings.iterations)
        assert points == pytest.approx(validated, rel=0.4)
        other = trained(resolve(experiment, profile, key, 2))
        assert other.optimization == settings


@pytest.mark.parametrize("key", ["dance_grpo", "mix_grpo", "flow_grpo", "g2rpo"])
def test_a_budget_of_seconds_is_not_ended_by_iterations_and_changes_none_of_them(key: str) -> None:
    profile = load_profile("mini")
    timed = trained(resolve(load_experiment("equal-cost"), profile, f"seconds/{key}", 1))
    whole = trained(resolve(load_experiment("table1"), profile, f"hps/{key}", 1))
    assert timed.optimization.iterations == 2 * whole.optimization.iterations
    for iteration in range(whole.optimization.iterations):
        one, other = (c.method.rollout_tree(c.shape, iteration) for c in (timed, whole))
        assert (one.states, one.groups) == (other.states, other.groups)
    for name in ("grid", "rollout", "advantage", "rewards"):
        assert getattr(timed, name) == getattr(whole, name)


TRIALS = """
name: trials
learning_rates: [4.5e-4, 2.0]
cells:
  one: {method: flow_grpo, train: [hps], set: {method: {eta: 0.5}}}
  two: {method: g2rpo, label: Mine, train: [hps]}
table: {title: Trials}
"""


def test_every_cell_is_trained_at_every_learning_rate(tmp_path: Path) -> None:
    (tmp_path / "trials.yaml").write_text(TRIALS)
    cells = load_experiment(str(tmp_path / "trials.yaml")).cells
    assert [(key, cell.group, cell.label) for key, cell in cells.items()] == [
        ("one/lr4.5e-4", "Flow-GRPO", "4.5e-4"), ("one/lr2e0", "Flow-GRPO", "2e0"),
        ("two/lr4.5e-4", "Mine", "4.5e-4"), ("two/lr2e0", "Mine", "2e0"),
    ]  # fmt: skip
    rate = {"optimization": {"learning_rate": 4.5e-4}}
    assert cells["one/lr4.5e-4"].set == {"method": {"eta": 0.5}} | rate
    assert cells["two/lr4.5e-4"].set == rate


@pytest.mark.parametrize(
    ("given", "instead", "message"),
    [
        ("[4.5e-4, 2.0]", "[4.5e-4, 4.5e-4]", "learning_rates repeats a rate"),
        ("[4.5e-4, 2.0]", "[fast]", "learning_rates.0: input should be a valid number"),
        ("[4.5e-4, 2.0]", "1.0e-5", "learning_rates: input should be a valid tuple"),
        ("method: g2rpo, label", "label", "train, set or budget"),
        ("{method: g2rpo, label: Mine, train: [hps]}", "{}", "needs cells with a method"),
        ("set: {method: {eta: 0.5}}", "set: 5", "cells.one.set"),
        ("method: flow_grpo", "method: [flow_grpo]", "cells.one.method"),
        ("method: flow_grpo", "method: flow_gpro", "no method 'flow_gpro'"),
        ("method: flow_grpo", "method: /etc/hostname", "no method '/etc/hostname'"),
    ],
)
def test_trials_that_cannot_be_are_refused_in_one_line(
    tmp_path: Path, given: str, instead: str, message: str
) -> None:
    assert given in TRIALS
    (tmp_path / "trials.yaml").write_text(TRIALS.replace(given, instead))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_experiment(str(tmp_path / "trials.yaml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", ["set", "override", "profile"])
def test_a_seed_is_no_setting_of_a_cell(way: str) -> None:
    experiment, profile = load_experiment("table1"), load_profile("mini")
    overrides = {"seed": 7} if way == "override" else {}
    if way == "set":
        cell = experiment.cells["hps/g2rpo"].model_copy(update={"set": {"seed": 7}})
        experiment = experiment.model_copy(update={"cells": {"hps/g2rpo": cell}})
    if way == "profile":
        profile = profile.model_copy(update={"training": {**profile.training, "seed": 7}})
    with pytest.raises(UserError, match=r"hps/g2rpo: seed: not a setting.*--seeds"):
        resolve(experiment, profile, "hps/g2rpo", 1, overrides)


def test_a_variant_without_a_tuned_rate_is_refused_where_others_have_one() -> None:
    experiment, profile = load_experiment("table1"), load_profile("mini")
    rates = {"g2rpo": 1e-5, "g2rpo_nomgai": 1e-5}
    profile = profile.model_copy(update={"learning_rates": rates})
    with pytest.raises(UserError, match="'g2rpo_no_mgai'; did you mean 'g2rpo_nomgai'"):
        resolve(experiment, profile, "hps/g2rpo_no_mgai", 1)
    untuned = profile.model_copy(update={"learning_rates": {}})
    assert trained(resolve(experiment, untuned, "hps/g2rpo_no_mgai", 1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("learning_rates: {g2rpoo: 1.0e-5}", "is not METHOD or"),
        ("method_settings: {g2rpoo: {}}", "did you mean 'g2rpo'"),
        ("seeds: [1, 1]", "seeds: repeated seed"),
        ("evaluation: {limit: 1}", r"evaluation\.limit: .*greater than or equal to 2"),
        ("seeds: [-1]", r"seeds\.0"),
        ("seeds: []", "seeds"),
        ("name: ../x", "name"),
        ("shortened: {}", "unknown key 'shortened'; it was renamed to 'budget_overrides'"),
        ("pictured_every: 5", "it was renamed to 'preview_every'"),
        ("prompts: {test: benchmarks/mini_world/assets/prompts/train.txt}", "the same file as"),
    ],
)
def test_a_mistake_in_a_profile_is_told_in_one_line(tmp_path: Path, change: str, told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: mini\n{change}\n")
    with pytest.raises(UserError, match=told) as caught:
        load_profile(str(path))
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=25)
@given(evaluations=st.integers(1, 40_000))
def test_iterations_within_a_budget_by_counting_up(evaluations: int) -> None:
    cell = resolve(load_experiment("table1"), load_profile("mini"), "hps/mix_grpo", 1)
    config = trained(cell)

    def cost(iterations: int) -> int:
        change = {"optimization": {"iterations": iterations}}
        data = merge(config.model_dump(mode="json"), change)
        return training_counts(TrainConfig.model_validate(data)).rollout_evaluations

    found = iterations_within(config, lambda counts: counts.rollout_evaluations, evaluations)
    assert found >= 1
    assert found == 1 or cost(found) <= evaluations
    assert cost(found + 1) > evaluations


G2RPO_ON_HPS = {"method": "g2rpo", "train": ["hps"]}


def cell_of(**changes: Any) -> dict[str, Any]:
    return {"cells": {"a": G2RPO_ON_HPS | changes}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cells": {"a": {"train": ["hps"]}}}, "base"),
        ({"cells": {"a": {"method": "g2rpo"}}}, "train is empty"),
        (cell_of(train=["hps", "hps"]), "train repeats a reward"),
        (cell_of(sett={}), "'set'"),
        (cell_of(tuned_as="x"), "renamed to 'learning_rate_key'"),
        (cell_of(budget={"evaluations_of": "b"}), "no cell 'b'"),
        (cell_of(budget={"evaluations_of": "a"}), "without a budget of its own"),
        (cell_of(budget={"cost_of": "a"}), "without a budget of its own"),
        (cell_of(budget={}), "exactly one of"),
        (cell_of(budget={"evaluations_of": "a", "device_seconds": 3}), "exactly one of"),
        ({"table": {**SMALL_TABLE, "columns": 5}}, "table.columns"),
        ({"table": {**SMALL_TABLE, "rows": [{"key": "a"}]}}, "cells are the rows"),
        ({"name": "../../../evil"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * 300}, "name"),
    ],
)
def test_a_mistake_in_an_experiment_is_told_in_one_line(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    path = tmp_path / "wrong.yaml"
    data = {"name": "wrong", "table": SMALL_TABLE, **cell_of(), **change}
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        load_experiment(str(path))
    assert "\n" not in str(caught.value)


def test_a_profile_without_device_seconds_is_told_where_they_are_asked_for() -> None:
    profile = load_profile("mini").model_copy(update={"device_seconds": None})
    with pytest.raises(UserError, match="profile mini has no device_seconds"):
        resolve(load_experiment("equal-cost"), profile, "seconds/g2rpo", 1)


def test_released_settings_are_shortened_where_the_profile_says_so() -> None:
    experiment = load_experiment("released-vs-matched")
    whole = load_profile("mini").model_copy(update={"budget_overrides": {}})
    for method, iterations, group in (("g2rpo", 301, 12), ("flow_grpo", 300, 24)):
        key = f"released/{method}"
        own = trained(resolve(experiment, whole, key, 1))
        short = trained(resolve(experiment, load_profile("mini"), key, 1))
        assert own.optimization.iterations == iterations
        assert short.optimization.iterations == 100
        assert short.rollout.group_size == own.rollout.group_size == group
        matched = trained(resolve(experiment, load_profile("mini"), f"matched/{method}", 1))
        assert matched.rollout.group_size == 8


def test_a_column_without_a_reward_of_the_profile_is_refused_before_anything_runs() -> None:
    experiment = load_experiment("table1")
    table = experiment.table.model_copy(update={"columns": (ColumnConfig(reward="hsp"),)})
    wrong = experiment.model_copy(update={"table": table})
    with pytest.raises(UserError, match="profile mini has no reward 'hsp'; did you"):
        expand(wrong, load_profile("mini"), (1,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": {"name": "four"}}, r"cells.a and cells.b are in the group 'A' but have different"),
        ({"b": {"limit": 4}}, r"cells.a and cells.b are in the group 'A' but have different"),
        (
            {"a": {"limit": 4}, "b": {"limit": 4}},
            r"cells.base and cells.a have different `evaluation`s that are both named '",
        ),
    ],
)
def test_rows_that_could_not_share_a_table_are_refused_before_the_run(
    changes: dict[str, dict[str, Any]], message: str
) -> None:
    trained = {"group": "A", "method": "g2rpo", "train": ["hps"]}
    cells = {key: trained | {"evaluation": changes.get(key, {})} for key in ("a", "b")}
    data = {"name": "x", "cells": {"base": {}, **cells}, "table": {"title": "T"}}
    with pytest.raises(UserError, match=message):
        expand(validate(Experiment, data, "x"), load_profile("smoke"), [1, 2])
    four = {"evaluation": {"name": "four", "limit": 4}}
    data["cells"] = {"base": {}, "a": trained | four, "b": trained | four}
    assert len(expand(validate(Experiment, data, "x"), load_profile("smoke"), [1, 2])) == 5
