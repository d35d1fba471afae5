"""The plan of a small experiment, for tests of what is submitted and where it stands."""

from pathlib import Path
from typing import Any

from g2rpo.config import validate
from reproduce.experiment import Experiment, Profile, expand, load_profile
from reproduce.experiment.layout import Layout
from reproduce.jobs.plan import Plan, make_plan

TABLE: dict[str, Any] = {
    "name": "t", "title": "A table", "baseline": "base",
    "columns": [{"reward": "hps", "label": "HPS"}],
}  # fmt: skip
CELLS: dict[str, Any] = {"base": {}, "hps/a": {"method": "g2rpo", "train": ["hps"]}}


def experiment_of(cells: dict[str, Any]) -> Experiment:
    return validate(Experiment, {"name": "t", "cells": cells, "table": TABLE}, "test")


def profile_of(shares: int) -> Profile:
    """The scale ``mini``, evaluated in so many shares."""
    profile = load_profile("mini")
    hardware = profile.hardware.model_copy(update={"evaluation_shares": shares})
    return profile.model_copy(update={"hardware": hardware})


def small_plan(
    folder: Path, shares: int = 1, seeds: tuple[int, ...] = (1,), cells: dict[str, Any] = CELLS
) -> Plan:
    """A base and a training, unless other cells are given."""
    experiment, profile = experiment_of(cells), profile_of(shares)
    layout = Layout(folder / "runs", folder / "runs")
    return make_plan(experiment, profile, expand(experiment, profile, seeds), layout)
