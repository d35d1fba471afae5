"""The size of a FLUX policy, from its configuration: parameters, tokens, operations."""

import functools
import json
from pathlib import Path

import pydantic

from g2rpo.errors import UserError, reason
from g2rpo.policy.architectures import evaluations_per_velocity, pipeline_name
from g2rpo.policy.config import LoraConfig, PolicyConfig
from g2rpo.policy.folder import folder_here

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
TIME_CHANNELS = 256
"""Width of the sinusoidal embedding of time and guidance."""
Linears = dict[str, tuple[int, int]]


class ModelSize(pydantic.BaseModel, frozen=True):
    """The configuration of a ``FluxTransformer2DModel`` and its autoencoder.

    Names and defaults are those of diffusers.
    """

    num_layers: int = 19
    """Double-stream blocks: separate weights for image and text."""
    num_single_layers: int = 38
    """Single-stream blocks: shared weights."""
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    in_channels: int = 64
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    factor: int = 8
    """Pixels per latent, along each side."""

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def blocks(self) -> int:
        """Number of blocks of both kinds."""
        return self.num_layers + self.num_single_layers

    @functools.cached_property
    def linears(self) -> Linears:
        """(inputs, outputs) of every linear layer, by name."""
        d = self.width
        layers = {"x_embedder": (self.in_channels, d), "proj_out": (d, self.in_channels)}
        layers |= {"context_embedder": (self.joint_attention_dim, d), "norm_out.linear": (d, 2 * d)}
        embedders = {"timestep": TIME_CHANNELS, "text": self.pooled_projection_dim}
        if self.guidance_embeds:
            embedders["guidance"] = TIME_CHANNELS
        for name, inputs in embedders.items():
            layers[f"time_text_embed.{name}_embedder.linear_1"] = (inputs, d)
            layers[f"time_text_embed.{name}_embedder.linear_2"] = (d, d)
        for index in range(self.num_layers):
            block = _double_block(d).items()
            layers |= {f"transformer_blocks.{index}.{name}": sides for name, sides in block}
        for index in range(self.num_single_layers):
            block = _single_block(d).items()
            layers |= {f"single_transformer_blocks.{index}.{name}": sides for name, sides in block}
        return layers

    @functools.cached_property
    def parameters(self) -> int:
        """Parameters of the transformer."""
        norms = (4 * self.num_layers + 2 * self.num_single_layers) * self.attention_head_dim
        return _parameters(self.linears) + norms

    @property
    def largest_block(self) -> int:
        """Parameters of the largest block."""
        double = _parameters(_double_block(self.width)) + 4 * self.attention_head_dim
        single = _parameters(_single_block(self.width)) + 2 * self.attention_head_dim
        return double if self.num_layers else single

    def lora_parameters(self, config: LoraConfig) -> int:
        """Parameters of adapters on the ``target_modules`` of ``config``."""
        ends = tuple(f".{target}" for target in config.target_modules)
        return config.rank * sum(
            sum(sides) for name, sides in self.linears.items() if f".{name}".endswith(ends)
        )

    def tokens(self, policy: PolicyConfig) -> int:
        """Tokens of one state: packed image and text."""
        height, width = (side // (2 * self.factor) for side in policy.size)
        return height * width + policy.max_sequence_length

    def operations(self, policy: PolicyConfig) -> float:
        """Floating-point operations of one velocity evaluation, in the blocks.

        Per block, each token is multiplied with 12 matrices of width x width; attention adds
        4 x tokens^2 x width.
        """
        tokens = self.tokens(policy)
        return self.blocks * (24.0 * self.width**2 * tokens + 4.0 * tokens**2 * self.width)

    def embedding_bytes(self, policy: PolicyConfig) -> int:
        """Bytes of one prompt's text embeddings: the sequence and the pooled vector."""
        numbers = policy.max_sequence_length * self.joint_attention_dim
        return (numbers + self.pooled_projection_dim) * DTYPE_BYTES[policy.dtype]


FLUX_DEV = ModelSize(guidance_embeds=True)
"""FLUX.1-dev, as published."""


def model_size(policy: PolicyConfig) -> ModelSize:
    """The size of a policy: from its folder if it is local, else FLUX.1-dev's.

    Raises:
        UserError: the folder's configuration cannot be read.
    """
    folder = Path(policy.source).expanduser()
    return read_size(folder) if (folder / "transformer" / "config.json").exists() else FLUX_DEV


def nfe_per_velocity(policy: PolicyConfig) -> int:
    """Forwards of the transformer for one velocity; 1 if the policy is not on this machine yet."""
    folder = folder_here(policy.source, policy.revision)
    if folder is None or not (folder / "model_index.json").is_file():
        return 1
    return evaluations_per_velocity(pipeline_name(folder), policy.guidance_scale)


@functools.cache
def read_size(folder: Path) -> ModelSize:
    """The size of the FluxPipeline in ``folder``.

    Raises:
        UserError: its configuration cannot be read.
    """
    try:
        transformer = json.loads((folder / "transformer" / "config.json").read_text())
        autoencoder = json.loads((folder / "vae" / "config.json").read_text())
        factor = 2 ** (len(autoencoder["block_out_channels"]) - 1)
        if transformer.get("_class_name") == "SD3Transformer2DModel":  # roughly a FLUX
            transformer |= {"num_single_layers": 0, "in_channels": 4 * transformer["in_channels"]}
        return ModelSize.model_validate(transformer | {"factor": factor})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: transformer/config.json and vae/config.json are not those of FLUX "
            f"({reason(error)}); fetch the folder again"
        ) from None


def _double_block(d: int) -> Linears:
    text = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    layers = {f"attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v", "to_out.0", *text)}
    for suffix in ("", "_context"):
        layers[f"norm1{suffix}.linear"] = (d, 6 * d)
        layers[f"ff{suffix}.net.0.proj"] = (d, 4 * d)
        layers[f"ff{suffix}.net.2"] = (4 * d, d)
    return layers


def _single_block(d: int) -> Linears:
    layers = {f"attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v")}
    return layers | {"norm.linear": (d, 3 * d), "proj_mlp": (d, 4 * d), "proj_out": (5 * d, d)}


def _parameters(layers: Linears) -> int:
    return sum((inputs + 1) * outputs for inputs, outputs in layers.values())
