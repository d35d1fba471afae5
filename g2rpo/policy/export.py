"""Exports a policy as a standard diffusers pipeline folder."""

import shutil
from pathlib import Path

from g2rpo.checksums import EXPORTED, FILES, checksums_of, write_document
from g2rpo.errors import UserError
from g2rpo.files import atomic_folder
from g2rpo.policy.base import Policy
from g2rpo.policy.folder import components


def export_pipeline(policy: Policy, folder: Path) -> None:
    """Writes a pipeline folder: the base's parts and the policy's transformer.

    ``DiffusionPipeline.from_pretrained(folder)`` loads it. The base's files are copied byte for
    byte; an existing ``folder`` is replaced.

    Raises:
        UserError: ``folder`` is or contains the folder that the policy was loaded from.
    """
    if policy.folder.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: would overwrite the base pipeline; export to another folder")
    with atomic_folder(folder) as temporary:
        shutil.copy2(policy.folder / "model_index.json", temporary)
        for name in components(policy.folder):
            if name != "transformer":
                shutil.copytree(policy.folder / name, temporary / name)
        policy.save_transformer(temporary / "transformer")
        write_checksums(temporary)


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files in an export."""
    files = checksums_of((path for path in folder.rglob("*") if path.is_file()), folder)
    write_document(folder / EXPORTED, {FILES: files})
