"""What a profile needs before its stages can run: devices, and files it builds itself."""

import pkgutil
from collections.abc import Sequence

import torch

from g2rpo.errors import UserError
from g2rpo.policy.config import PolicyConfig
from g2rpo.policy.size import assumption, check_sides, model_size
from g2rpo.training.memory import GIB, check_encoders_fit, check_fits
from reproduce.experiment import ROOT, Experiment, Profile, ResolvedCell, reward_configs
from slurm.cluster import Cluster, has_slurm

SMALLER = "run the same experiment here with --profile mini"


def check_hardware(profile: Profile, experiment: Experiment, cluster: Cluster) -> None:
    """Checks that this machine has the GPUs of a profile, or sbatch.

    Without training, one GPU is enough.

    Raises:
        UserError: names what is missing and the fix.
    """
    if cluster.kind == "slurm":
        if not has_slurm():
            raise UserError(
                f"cluster {cluster.name} needs sbatch, which is not on the path; submit from a "
                f"login node, or use --cluster local; or {SMALLER}"
            )
        return
    needs = profile.hardware
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not experiment.trains:
        if found < min(1, needs.gpus):
            raise UserError(
                f"profile {profile.name} needs a GPU of {needs.gpu_memory_gb} GB or more to sample "
                "and this machine has none; run it on a machine with a GPU"
            )
        return
    if found < needs.gpus:
        raise UserError(
            f"profile {profile.name} needs {needs.gpus} GPUs of {needs.gpu_memory_gb} GB or more "
            f"and this machine has {found}; use a SLURM cluster (--cluster), or {SMALLER}"
        )


def check_memory(profile: Profile, cells: Sequence[ResolvedCell]) -> None:
    """Rejects what does not fit in GPU memory, before anything is submitted or loaded.

    If nothing is known of the base model yet, the job checks before loading it.

    Raises:
        UserError: states the memory needed and what would fit.
    """
    needs = profile.hardware
    if not needs.gpus or not needs.gpu_memory_gb:
        return
    available = float(needs.gpu_memory_gb * GIB)
    for cell in cells:
        if assumption(cell.policy) is not None:
            continue
        try:
            if needs.evaluation_devices:
                check_encoders_fit(cell.policy, available)
            if cell.train is not None:
                size = model_size(cell.train.policy)
                check_fits(cell.train, size, needs.training_ranks, available)
        except UserError as error:
            raise UserError(f"{cell.key}, profile {profile.name}: {error}") from None


def check_held_out_prompts(profile: Profile, cells: Sequence[ResolvedCell]) -> None:
    """Checks that the held-out prompts can be scored, before anything is trained for them.

    Raises:
        UserError: there are too few for an interval, or a reward cannot score one.
    """
    from g2rpo.rewards.registry import check_prompts  # slow: the rewards' libraries

    sets = {(c.evaluation_prompts, c.evaluation.limit): c for c in cells if c.credit is None}
    for (path, _), cell in sets.items():
        prompts = cell.held_out_prompts()
        if len(prompts) < 2:
            raise UserError(f"{path}: has one prompt; an interval needs at least two")
        texts = [prompt.text for prompt in prompts]
        check_prompts(reward_configs(profile).values(), texts)


def check_image_sizes(profile: Profile, cells: Sequence[ResolvedCell]) -> None:
    """Rejects images that are not a whole number of patches of a policy that is known.

    Raises:
        UserError: names the cell, the side and the nearest possible one.
    """
    policies: dict[tuple[str, tuple[int, int]], tuple[str, PolicyConfig]] = {}
    for cell in cells:
        for policy in (cell.policy, *([] if cell.train is None else [cell.train.policy])):
            policies.setdefault((policy.source, policy.size), (cell.key, policy))
    for key, policy in policies.values():
        if assumption(policy) is None:
            try:
                check_sides(policy, model_size(policy).factor)
            except UserError as error:
                raise UserError(f"{key}, profile {profile.name}: {error}") from None


def build_assets(profile: Profile) -> None:
    """Builds the files of a profile that has a build step."""
    if profile.build is None or profile.assets is None:
        return
    pkgutil.resolve_name(profile.build)(ROOT / profile.assets)
