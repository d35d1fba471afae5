"""Experiments and profiles: the cells of a table, and how each is trained and evaluated."""

from reproduce.bundled import HERE, ROOT, absolute
from reproduce.experiment.cells import Experiment, load_experiment
from reproduce.experiment.origins import explain
from reproduce.experiment.profile import Hardware, Profile, load_profile
from reproduce.experiment.resolving import ResolvedCell, Resolver, expand, resolve, reward_configs

__all__ = [
    "HERE",
    "ROOT",
    "Experiment",
    "Hardware",
    "Profile",
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
