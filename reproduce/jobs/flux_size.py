"""The size of a FLUX transformer from its configuration alone: parameters, operations, bytes."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g2rpo.policy import PolicyConfig

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
TIME_CHANNELS = 256
"""Width of the sinusoidal embedding of time and guidance."""
LORA_RANK = 128
"""Assumed where the configuration states none."""


@dataclass(frozen=True)
class FluxSize:
    """The constants of a ``FluxTransformer2DModel`` and of the autoencoder before it.

    Attributes:
        double_blocks: blocks with separate weights for image and text.
        single_blocks: blocks with common weights.
        heads: attention heads.
        head_width: of one head.
        in_channels: of a packed latent.
        joint_width: of the text encoder's sequence.
        pooled_width: of the pooled text vector.
        guidance: whether guidance is embedded.
        factor: pixels to a latent's side, of the autoencoder.
    """

    double_blocks: int
    single_blocks: int
    heads: int
    head_width: int
    in_channels: int
    joint_width: int
    pooled_width: int
    guidance: bool
    factor: int = 8

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.heads * self.head_width

    @property
    def parameters(self) -> int:
        """Of the transformer."""
        d, head = self.width, self.head_width
        embedders = _linear(self.in_channels, d) + _linear(self.joint_width, d)
        embedders += (1 + self.guidance) * (_linear(TIME_CHANNELS, d) + _linear(d, d))
        embedders += _linear(self.pooled_width, d) + _linear(d, d)
        # Image and text each: modulation, query, key, value and output, feed-forward, two norms.
        stream = _linear(d, 6 * d) + 4 * _linear(d, d) + _linear(d, 4 * d) + _linear(4 * d, d)
        double = 2 * (stream + 2 * head)
        single = _linear(d, 3 * d) + 3 * _linear(d, d) + 2 * head
        single += _linear(d, 4 * d) + _linear(5 * d, d)
        last = _linear(d, 2 * d) + _linear(d, self.in_channels)
        return embedders + self.double_blocks * double + self.single_blocks * single + last

    @property
    def lora_parameters(self) -> int:
        """Of adapters of :data:`LORA_RANK` on all attention projections."""
        projections = 8 * self.double_blocks + 3 * self.single_blocks
        return projections * 2 * self.width * LORA_RANK

    def image_tokens(self, resolution: int) -> int:
        """Packed tokens of a square image."""
        return (resolution // (2 * self.factor)) ** 2

    def operations(self, resolution: int, text_tokens: int) -> float:
        """Floating-point operations of one velocity evaluation, in the blocks.

        Each token passes 12 matrices of width x width in each block; attention adds 4 x tokens^2
        x width.
        """
        tokens = self.image_tokens(resolution) + text_tokens
        blocks = self.double_blocks + self.single_blocks
        return blocks * (24.0 * self.width**2 * tokens + 4.0 * tokens**2 * self.width)


FLUX_DEV = FluxSize(19, 38, 24, 128, 64, 4096, 768, guidance=True)
"""FLUX.1-dev, as published."""


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


@functools.lru_cache(maxsize=256)
def _config_file(source: str, part: str) -> Path:
    return Path(source) / part / "config.json"


def flux_size(policy: PolicyConfig) -> FluxSize:
    """The size of a policy: from its files where they are here, else FLUX.1-dev's."""
    try:
        found = _config_file(policy.source, "transformer").stat()
    except OSError:
        return FLUX_DEV
    return _read_size(policy.source, found.st_ino, found.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_size(source: str, *state: int) -> FluxSize:
    del state  # of the file: another one where it has changed
    transformer: dict[str, Any] = json.loads(_config_file(source, "transformer").read_text())
    vae: dict[str, Any] = json.loads(_config_file(source, "vae").read_text())
    return FluxSize(
        double_blocks=transformer["num_layers"],
        single_blocks=transformer["num_single_layers"],
        heads=transformer["num_attention_heads"],
        head_width=transformer["attention_head_dim"],
        in_channels=transformer["in_channels"],
        joint_width=transformer["joint_attention_dim"],
        pooled_width=transformer["pooled_projection_dim"],
        guidance=transformer["guidance_embeds"],
        factor=2 ** (len(vae["block_out_channels"]) - 1),
    )
