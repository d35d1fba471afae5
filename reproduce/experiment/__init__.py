"""Experiments and profiles: the cells of a table, and how each is trained and evaluated."""

from reproduce.bundled import HERE, ROOT, absolute
from reproduce.experiment.cells import (
    Budget,
    CellConfig,
    Experiment,
    load_experiment,
)
from reproduce.experiment.origins import explain
from reproduce.experiment.profile import Hardware, Profile, PromptSplits, load_profile
from reproduce.experiment.resolving import ResolvedCell, Resolver, expand, resolve, reward_configs

__all__ = [
    "HERE",
    "ROOT",
    "Budget",
    "CellConfig",
    "Experiment",
    "Hardware",
    "Profile",
    "PromptSplits",
    "ResolvedCell",
    "Resolver",
    "absolute",
    "expand",
    "explain",
    "load_experiment",
    "load_profile",
    "resolve",
    "reward_configs",
]
