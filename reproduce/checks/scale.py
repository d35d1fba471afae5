"""What a profile needs where it runs: devices, files, weights, disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reproduce.experiment import ROOT, load_profile
from reproduce.experiment.weights import fetch_advice, weights_states
from reproduce.stages.run import CLASSES
from slurm.checks.finding import Case, Finding, Question, listed
from slurm.cluster import Cluster
from slurm.graph import Needs

if TYPE_CHECKING:
    from reproduce.experiment import Profile

DISK_GB = {"replicated": 1.0, "lora": 50.0, "sharded": 300.0}
"""Free space below which there is a warning, by engine. A full checkpoint of FLUX.1 (12 billion
parameters and AdamW's two moments in float32) is about 144 GB; at times there are two."""


def case_of(profile: "Profile", cluster: Cluster, results: Path, cached: Sequence[str]) -> Case:
    """The case to check; ``cached`` are the profile's published weights that are cached here."""
    return Case(
        cluster,
        needs_by_kind(profile),
        results,
        shares=profile.hardware.evaluation_shares,
        question=Question(
            modules=("reproduce.stages.scoring", "g2rpo.training.loop"),
            files=tuple(map(str, _needed_files(profile))),
            artifacts=tuple(cached),
            gpu_memory_gb=profile.hardware.gpu_memory_gb,
            disk_gb=DISK_GB[profile.engine],
        ),
    )


def needs_by_kind(profile: "Profile") -> dict[str, Needs]:
    """The devices of each kind of stage of a profile."""
    return {kind: stage.devices(profile.hardware) for kind, stage in CLASSES.items()}


def _needed_files(profile: "Profile") -> tuple[Path, ...]:
    """The prompt files, and folders of unpublished weights."""
    if profile.build is not None:  # builds its own files when it runs
        return ()
    prompts = profile.prompts
    sources = [profile.policy.source, *(config.source for config in profile.rewards.values())]
    local = [each for each in sources if each is not None and (ROOT / each).exists()]
    named = dict.fromkeys([prompts.train, prompts.validation, prompts.test, *local])
    return tuple(ROOT / each for each in named)


def check_weights(profile: str) -> tuple[Finding, list[str]]:
    """Whether a profile's published weights are cached here, and the names of those that are."""
    states = weights_states(load_profile(profile))
    cached = [state.artifact.name for state in states if state.is_whole]
    absent = [f"{state.artifact.name} ({state.word})" for state in states if not state.is_whole]
    if absent:
        found = f"{len(cached)} of {len(states)} cached here; missing: {listed(absent)}"
        return Finding("failed", "weights", found, fetch_advice(profile)), cached
    found = f"all {len(states)} cached here" if states else "the profile needs no published weights"
    return Finding("ok", "weights", found), cached
