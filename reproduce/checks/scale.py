"""What a scale needs of the place where it is to run: devices, files, weights, disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from g2rpo.hub.catalogue import catalogue
from g2rpo.hub.lock import read_lock
from g2rpo.hub.status import artifact_state
from reproduce.commands.weights import WEIGHTS, needed_by_profile
from reproduce.experiment import ROOT
from reproduce.stages.run import CLASSES
from slurm.checks.finding import Case, Finding, listed
from slurm.cluster import Cluster
from slurm.graph import Needs

if TYPE_CHECKING:
    from reproduce.experiment import Profile

DISK_GB = {"replicated": 1.0, "lora": 50.0, "sharded": 300.0}
"""Free space that is worth a warning, by engine. A checkpoint to resume all of FLUX.1 from (12 G
parameters and AdamW's two moments in float32) is about 144 GB; two are there at times."""


def case_of(profile: "Profile", cluster: Cluster, results: Path, cached: Sequence[str]) -> Case:
    """What a cluster is checked for.

    Args:
        profile: the scale.
        cluster: the cluster profile.
        results: the folder that jobs write to.
        cached: published weights that the profile needs and that are cached here.
    """
    return Case(
        cluster,
        needs_by_kind(profile),
        results,
        shares=profile.hardware.evaluation_shares,
        gpu_memory_gb=profile.hardware.gpu_memory_gb,
        disk_gb=DISK_GB[profile.engine],
        modules=("reproduce.stages.scoring", "g2rpo.training.loop"),
        files=_needed_files(profile),
        artifacts=tuple(cached),
    )


def needs_by_kind(profile: "Profile") -> dict[str, Needs]:
    """The devices of each kind of stage of a profile."""
    return {kind: stage.devices(profile.hardware) for kind, stage in CLASSES.items()}


def _needed_files(profile: "Profile") -> tuple[Path, ...]:
    """The prompt files, and the folders of weights that are no published ones."""
    if profile.build is not None:  # it makes its own when it runs
        return ()
    prompts = profile.prompts
    sources = [profile.policy.source, *(config.source for config in profile.rewards.values())]
    local = [each for each in sources if each is not None and (ROOT / each).exists()]
    named = dict.fromkeys([prompts.train, prompts.validation, prompts.test, *local])
    return tuple(ROOT / each for each in named)


def weights_by_state(profile: str) -> tuple[list[str], dict[str, tuple[str, int]]]:
    """The published weights of a profile: those that are cached whole, and of the others what
    they lack and their bytes (0 where that is not known)."""
    lock = read_lock()
    cached: list[str] = []
    absent: dict[str, tuple[str, int]] = {}
    for artifact in needed_by_profile(profile, catalogue().select([], WEIGHTS)):
        word = artifact_state(artifact, lock).word
        if word in ("cached", "locked"):
            cached.append(artifact.name)
        else:
            absent[artifact.name] = (word, artifact.size()[0] or 0)
    return cached, absent


def check_weights(profile: str) -> tuple[Finding, list[str]]:
    """Whether the published weights of a profile are cached here, and the names of those."""
    cached, absent = weights_by_state(profile)
    total = len(cached) + len(absent)
    if absent:
        names = listed(f"{name} ({word})" for name, (word, _) in absent.items())
        fix = f"`g2rpo weights fetch --profile {profile}` where there is a network"
        found = f"{len(cached)} of {total} cached here; not {names}"
        return Finding("failed", "weights", found, fix), cached
    found = f"all {total} cached here" if total else "no published ones are needed"
    return Finding("ok", "weights", found), cached
