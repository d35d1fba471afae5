"""What a profile needs before its stages can run: devices, and files that it makes itself."""

import importlib
from collections.abc import Sequence

import torch

from g2rpo.errors import UserError
from g2rpo.policy import PolicyConfig
from g2rpo.policy.folder import folder_here
from g2rpo.policy.size import ModelSize, read_size
from g2rpo.training.memory import GIB, check_fits
from reproduce.experiment import ROOT, Experiment, Profile, ResolvedCell
from slurm.cluster import Cluster, has_slurm

MEND = "PROFILE=mini runs the same experiment here"


def check_hardware(profile: Profile, experiment: Experiment, cluster: Cluster) -> None:
    """Refuses a profile that this version or the chosen place cannot run.

    Sampling and scoring alone take one GPU, however many the training takes.

    Raises:
        UserError: one line that names what is missing and how to mend it.
    """
    if cluster.kind == "slurm":
        if not has_slurm():
            raise UserError(
                f"cluster {cluster.name} needs SLURM and sbatch is not on this machine's path; "
                f"submit where it is, or use CLUSTER=local; {MEND}"
            )
    else:
        _check_this_machine(profile, experiment)


def _check_this_machine(profile: Profile, experiment: Experiment) -> None:
    needs = profile.hardware
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not experiment.trains:
        if found < min(1, needs.gpus):
            raise UserError(
                f"profile {profile.name} needs a GPU of {needs.gpu_memory_gb} GB or more to sample "
                "and this machine shows none; run it where there is one"
            )
        return
    if found < needs.gpus:
        raise UserError(
            f"profile {profile.name} needs {needs.gpus} GPUs of {needs.gpu_memory_gb} GB or more "
            f"and this machine shows {found}, and no SLURM was found or asked for; {MEND}"
        )


def check_memory(profile: Profile, cells: Sequence[ResolvedCell]) -> None:
    """Refuses, before anything is submitted or loaded, a training that its GPUs cannot hold.

    Where the base's files are not here, that is left to the job, which looks before it loads.

    Raises:
        UserError: one line that says what it needs and what would fit.
    """
    needs = profile.hardware
    if not needs.gpus or not needs.gpu_memory_gb:
        return
    available = float(needs.gpu_memory_gb * GIB)
    for cell in cells:
        config = cell.train
        size = None if config is None else _size_here(config.policy)
        if config is None or size is None:
            continue
        try:
            check_fits(config, size, needs.training_ranks, available)
        except UserError as error:
            raise UserError(f"{cell.key}, profile {profile.name}: {error}") from None


def _size_here(policy: PolicyConfig) -> ModelSize | None:
    folder = folder_here(policy.source, policy.revision)
    if folder is None or not (folder / "transformer" / "config.json").exists():
        return None
    return read_size(folder)


def build_assets(profile: Profile) -> None:
    """Builds the files of a profile that makes its own."""
    if profile.build is None or profile.assets is None:
        return
    module, _, name = profile.build.partition(":")
    importlib.import_module(module).__dict__[name](ROOT / profile.assets)
