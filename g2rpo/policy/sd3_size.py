"""The size of a Stable Diffusion 3 or 3.5 policy."""

import functools
from typing import ClassVar, Literal

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


class SD3Size(ModelSize, frozen=True):
    """The configuration of an ``SD3Transformer2DModel`` and its autoencoder."""

    num_layers: int = 18
    num_attention_heads: int = 18
    attention_head_dim: int = 64
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    pooled_projection_dim: int = 2048
    caption_projection_dim: int = 1152
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    """Blocks with a second attention, over the image alone (SD3.5 Medium)."""
    qk_norm: Literal["rms_norm"] | None = None
    clip_tokens: ClassVar[int] = 77

    @property
    def buffers(self) -> int:
        """The position embedding, which is not trained."""
        return self.pos_embed_max_size**2 * self.width

    @functools.cached_property
    def blocks(self) -> dict[str, Block]:
        indices = range(self.num_layers)
        return {f"transformer_blocks.{index}": self._block(index) for index in indices}

    def _block(self, index: int) -> Block:
        d, normed = self.width, self.qk_norm is not None
        layers, norms = joint_layers(d), 4
        attentions: tuple[Rows, ...] = ("all",)
        # Counted by running the modules on tensors without data
        # (tests/unit/test_memory_by_fake_tensors.py). The norms compute in float32.
        kept: dict[Rows, float] = {"all": 21 + 8 * normed}
        frozen: dict[Rows, float] = {"all": 10 + 6 * normed}
        if index in self.dual_attention_layers:
            names = ("to_q", "to_k", "to_v", "to_out.0")
            layers |= {f"attn2.{name}": Layer(d, d, "image") for name in names}
            layers["norm1.linear"] = Layer(d, 9 * d, "one")
            norms, attentions = 6, ("all", "image")
            kept["image"], frozen["image"] = 6 + 8 * normed, 4 + 6 * normed
        if index == self.num_layers - 1:  # its text is not used any more
            for name in ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"):
                del layers[name]
            layers["norm1_context.linear"] = Layer(d, 2 * d, "one")
        head = self.attention_head_dim if normed else 0
        return Block(layers, norms * head, attentions, kept, frozen)

    @functools.cached_property
    def other_layers(self) -> Layers:
        d, pixels = self.width, self.patch_size**2
        text = Layer(self.joint_attention_dim, self.caption_projection_dim, "text")
        embedders = {"timestep": TIME_CHANNELS, "text": self.pooled_projection_dim}
        return time_text_layers(embedders, d) | {
            "pos_embed.proj": Layer(pixels * self.in_channels, d, "image"),
            "context_embedder": text,
            "norm_out.linear": Layer(d, 2 * d, "one"),
            "proj_out": Layer(d, pixels * self.out_channels, "image"),
        }
