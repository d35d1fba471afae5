"""The architectures of policies, by the class of their diffusers pipeline."""

from pathlib import Path

from g2rpo.errors import UserError
from g2rpo.files import read_json

POLICIES = {"FluxPipeline": ("g2rpo.policy.flux", "FluxPolicy")}
"""Module and class of the policy of each pipeline."""


def pipeline_name(folder: Path) -> str:
    """The class of the diffusers pipeline in ``folder``.

    Raises:
        UserError: there is none, or none that a policy is made of.
    """
    index = folder / "model_index.json"
    known = " or ".join(POLICIES)
    if not index.is_file():
        raise UserError(
            f"{folder}: not a {known} folder: no model_index.json (create one with "
            f"{next(iter(POLICIES))}.save_pretrained)"
        )
    name = str(read_json(index).get("_class_name"))
    if name not in POLICIES:
        raise UserError(f"{folder}: a {name}, not a {known}; other models are not supported")
    return name
