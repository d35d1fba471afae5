"""Loads the policy that a pipeline folder holds, whatever its architecture."""

import pkgutil
from pathlib import Path

import torch

from g2rpo.errors import UserError
from g2rpo.policy.architectures import ARCHITECTURES, pipeline_name
from g2rpo.policy.base import Policy
from g2rpo.policy.checkpoint import CheckpointFiles, check_fits
from g2rpo.policy.config import PolicyConfig
from g2rpo.policy.folder import checked_device, folder_here, resolve_source


def policy_class(folder: Path) -> type[Policy]:
    """The policy of the pipeline in ``folder``.

    Raises:
        UserError: see :func:`pipeline_name`.
    """
    kind: type[Policy] = pkgutil.resolve_name(ARCHITECTURES[pipeline_name(folder)].policy)
    return kind


def check_checkpoint(config: PolicyConfig, files: CheckpointFiles) -> None:
    """Checks that a checkpoint is of the architecture of its base; reads no weights.

    Nothing is checked while the base is not on this machine.

    Raises:
        UserError: see :func:`check_fits`.
    """
    folder = folder_here(config.source, config.revision)
    if folder is not None:
        transformer = policy_class(folder).empty_transformer(config, folder)
        check_fits(files, transformer, dict(transformer.config), folder)


def load_policy(
    config: PolicyConfig, device: torch.device | str, *, weights: bool = True
) -> Policy:
    """Loads a policy of the architecture that its folder names (:meth:`Policy.load`).

    Raises:
        UserError: as :meth:`Policy.load`, the source cannot be found or fetched, its architecture
            is not supported or not ``config.pipeline``, or there is no such ``device``.
    """
    device = checked_device(device)
    folder = resolve_source(config.source, config.revision)
    found = pipeline_name(folder)
    if config.pipeline not in (None, found):
        raise UserError(
            f"policy.pipeline is {config.pipeline}, but {folder} has a {found}; remove the key"
        )
    return policy_class(folder).load(config, folder, device, weights=weights)
