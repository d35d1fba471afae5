"""The size of a FLUX policy."""

import functools

from g2rpo.policy.size import (
    TIME_CHANNELS,
    Block,
    Layer,
    Layers,
    ModelSize,
    Rows,
    joint_layers,
    time_text_layers,
)

KEPT_FROZEN: dict[Rows, float] = {"all": 9.5}
"""With the inputs of adapters on the default layers these are 12.5 outputs per block of FLUX.1-dev:
from 34.0 GiB against 24.6 GiB, measured at 720x720 without and with gradient checkpointing."""


class FluxSize(ModelSize, frozen=True):
    """The configuration of a ``FluxTransformer2DModel`` and its autoencoder."""

    num_layers: int = 19
    """Double-stream blocks: separate weights for image and text."""
    num_single_layers: int = 38
    """Single-stream blocks: shared weights."""
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    in_channels: int = 64
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False

    @functools.cached_property
    def blocks(self) -> dict[str, Block]:
        d, head = self.width, self.attention_head_dim
        joint = joint_layers(d)
        shared = {f"attn.{name}": Layer(d, d, "all") for name in ("to_q", "to_k", "to_v")}
        shared |= {
            "norm.linear": Layer(d, 3 * d, "one"),
            "proj_mlp": Layer(d, 4 * d, "all"),
            "proj_out": Layer(5 * d, d, "all"),
        }
        # Full fine-tuning keeps the inputs of all linear layers. Counted by running the modules on
        # tensors without data (tests/unit/test_memory_by_fake_tensors.py).
        double = Block(joint, 4 * head, ("all",), {"all": 22}, KEPT_FROZEN)
        single = Block(shared, 2 * head, ("all",), {"all": 19}, KEPT_FROZEN)
        doubles = {f"transformer_blocks.{index}": double for index in range(self.num_layers)}
        singles = {
            f"single_transformer_blocks.{index}": single for index in range(self.num_single_layers)
        }
        return doubles | singles

    @functools.cached_property
    def other_layers(self) -> Layers:
        d = self.width
        embedders = {"timestep": TIME_CHANNELS, "text": self.pooled_projection_dim}
        if self.guidance_embeds:
            embedders["guidance"] = TIME_CHANNELS
        return time_text_layers(embedders, d) | {
            "x_embedder": Layer(self.in_channels, d, "image"),
            "context_embedder": Layer(self.joint_attention_dim, d, "text"),
            "norm_out.linear": Layer(d, 2 * d, "one"),
            "proj_out": Layer(d, self.in_channels, "image"),
        }
