"""`g2rpo config`: every value of a cell, and the layer that it comes from."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from g2rpo.config import validate
from g2rpo.training.config import TrainConfig
from reproduce.cli import app
from reproduce.experiment import load_experiment, load_profile, resolve


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["config", *arguments])
    assert done.exit_code == 0, done.exception
    return done.stdout


def origin(text: str, *keys: str) -> tuple[str, str]:
    """The value at nested ``keys`` as it is printed, and its layer."""
    lines = iter(text.splitlines())
    found = ""
    for depth, key in enumerate(keys):
        found = next(line for line in lines if line.startswith("  " * depth + f"{key}:"))
    value, _, layer = found.partition("  # ")
    return value.split(":", 1)[1].strip(), layer


def test_each_layer_is_named() -> None:
    settings = ("--seed", "7", "-s", "optimization.iterations=9")
    text = printed("table1", "hps/g2rpo_no_mgai", *settings)
    assert text.startswith("# table1, hps/g2rpo_no_mgai, seed 7, profile mini, preset matched\n")
    for keys, expected in {
        ("training", "seed"): ("7", "--seed"),
        ("training", "grid", "steps"): ("8", "profile"),
        ("training", "method", "eta"): ("0.7", "preset"),
        ("training", "method", "stochastic_steps"): ("[0, 1, 2]", "profile's method_settings"),
        ("training", "method", "granularities"): ("[1]", "cell"),  # the preset's are {1, 2, 3}
        ("training", "optimization", "learning_rate"): ("0.00015", "tuned rate"),
        ("training", "optimization", "iterations"): ("9", "-s"),  # the profile says 100
        ("training", "optimization", "optimizer"): ("adamw", "default"),
        ("training", "lora"): ("null", "default"),
        ("evaluation", "name"): ("mini-ode20", "profile"),
        ("evaluation", "hybrid"): ("null", "default"),
        ("policy", "resolution"): ("32", "evaluation"),
        ("rewards", "attributes", "batch_size"): ("128", "profile"),
    }.items():
        assert origin(text, *keys) == expected, keys


def test_budgets_and_protocols_are_layers_too() -> None:
    timed = printed("equal-cost", "seconds/mix_grpo")
    assert origin(timed, "training", "optimization", "max_device_seconds") == ("34.0", "budget")
    assert origin(timed, "training", "optimization", "iterations") == ("200", "budget")
    assert origin(timed, "training", "method", "interval")[1] == "budget"
    assert origin(timed, "training", "method", "stride") == ("1", "preset")
    shorter = origin(printed("released-vs-matched", "released/g2rpo"),
                     "training", "optimization", "iterations")  # fmt: skip
    assert shorter == ("100", "profile's budget_overrides")
    table3 = printed("table3", "steps10/g2rpo", "--profile", "flux")
    assert origin(table3, "evaluation", "grid", "steps") == ("10", "cell")
    assert origin(table3, "evaluation", "grid", "schedule") == ("flux_dynamic", "profile")


def test_another_method_or_objective_takes_nothing_from_the_one_it_replaces(tmp_path: Path) -> None:
    cell = {
        "method": "dgpo", "preset": "released", "train": ["hps"],
        "set": {"objective": {"name": "nft", "old": {"limit": 0.4}}},
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    table = {"title": "Mine"}
    path.write_text(yaml.safe_dump({"name": "mine", "cells": {"hps/mine": cell}, "table": table}))
    text = printed(str(path), "hps/mine", "-s", "method.name=g2rpo")
    for keys, expected in {
        ("objective", "name"): ("nft", "cell"),
        ("objective", "times", "count"): ("null", "default"),  # DGPO has 4
        ("objective", "old", "rollouts_after"): ("0", "default"),  # 200
        ("objective", "old", "limit"): ("0.4", "cell"),
        ("objective", "beta"): ("1.0", "default"),  # 100
        ("method", "name"): ("g2rpo", "-s"),  # has no solver
        ("optimization", "clip_range"): ("0.01", "preset"),
    }.items():
        assert origin(text, "training", *keys) == expected, keys
    # Where the objective stays the same, the layers below count.
    text = printed("family", "hps/dgpo", "-s", "objective.old.limit=0.2")
    assert origin(text, "training", "objective", "name") == ("dgpo", "preset")


def test_what_is_not_trained_has_no_training() -> None:
    assert list(yaml.safe_load(printed("table1", "base"))) == ["policy", "evaluation", "rewards"]
    loaded = printed("released", "hybrid/g2rpo", "--profile", "flux")
    assert origin(loaded, "checkpoint", "source") == ("yujieouo/G2RPO", "cell")
    assert origin(loaded, "evaluation", "hybrid", "tuned_fraction") == ("0.6", "cell")


@pytest.mark.parametrize("profile", ["mini", "flux-lora-40gb"])
def test_what_is_printed_is_the_whole_configuration(profile: str) -> None:
    loaded = load_profile(profile)
    cell = resolve(load_experiment("choices"), loaded, "flow_grpo/kl", loaded.seeds[0])
    text = yaml.safe_load(printed("choices", "flow_grpo/kl", "--profile", profile))
    assert validate(TrainConfig, text["training"], "printed") == cell.train
