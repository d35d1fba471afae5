"""The policy: an image model of diffusers, as velocities over packed latents."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from g2rpo.policy.config import CheckpointConfig, LoraConfig, PolicyConfig

if TYPE_CHECKING:
    from g2rpo.policy.base import Policy
    from g2rpo.policy.conditioning import Conditioning
    from g2rpo.policy.export import export_pipeline
    from g2rpo.policy.load import load_policy

__all__ = [
    "CheckpointConfig",
    "Conditioning",
    "LoraConfig",
    "Policy",
    "PolicyConfig",
    "export_pipeline",
    "load_policy",
]
# Importing the model libraries takes seconds, too long for commands that only plan.
_LATER = {
    "Conditioning": "conditioning",
    "Policy": "base",
    "export_pipeline": "export",
    "load_policy": "load",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"g2rpo.policy.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
