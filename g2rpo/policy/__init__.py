"""The policy: FLUX through diffusers, seen by everything else as velocities over packed latents."""

from g2rpo.policy.checkpoint import CheckpointConfig
from g2rpo.policy.conditioning import Conditioning
from g2rpo.policy.export import export_pipeline
from g2rpo.policy.flux import FluxPolicy, PolicyConfig
from g2rpo.policy.lora import LoraConfig

__all__ = [
    "CheckpointConfig",
    "Conditioning",
    "FluxPolicy",
    "LoraConfig",
    "PolicyConfig",
    "export_pipeline",
]
