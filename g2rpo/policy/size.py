"""The size of a policy, from its configuration: parameters, tokens, operations, numbers kept.

Each architecture has a subclass of :class:`ModelSize`. Nothing here imports a model library, since
plans read it.
"""

import functools
import pkgutil
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import pydantic

from g2rpo.errors import UserError, reason
from g2rpo.files import read_json
from g2rpo.hub.catalogue import PublishedPolicy, catalogue
from g2rpo.policy.architectures import ARCHITECTURES, evaluations_per_velocity, pipeline_name
from g2rpo.policy.config import ImageConfig, LoraConfig, PolicyConfig
from g2rpo.policy.folder import folder_here

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
TIME_CHANNELS = 256
"""Width of the sinusoidal embedding of time and guidance."""
ASSUMED = "black-forest-labs/FLUX.1-dev"
"""What a policy is taken for that is neither on this machine nor in the catalogue, and names no
pipeline."""
Rows = Literal["image", "text", "all", "one"]
"""What a layer runs over: the tokens of a state, or once for all of them."""


class Layer(NamedTuple):
    """A linear layer, or the convolution that turns patches into tokens."""

    inputs: int
    outputs: int
    rows: Rows
    bias: bool = True

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return (self.inputs + self.bias) * self.outputs


Layers = dict[str, Layer]


@dataclass(frozen=True)
class Block:
    """One block of a transformer.

    Attributes:
        layers: its linear layers by name.
        norms: parameters of its norms.
        attentions: the tokens of each attention.
        kept: block outputs that a forward keeps for the backward in full fine-tuning, by their
            tokens.
        kept_frozen: the same with frozen weights; adapters also keep their inputs.
    """

    layers: Layers
    norms: int
    attentions: tuple[Rows, ...]
    kept: Mapping[Rows, float]
    kept_frozen: Mapping[Rows, float]

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(layer.parameters for layer in self.layers.values()) + self.norms


class ModelSize(pydantic.BaseModel, ABC, frozen=True):
    """The configuration of a transformer and its autoencoder.

    Names and defaults are those of diffusers.
    """

    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 0
    factor: int = 8
    """Pixels per latent, along each side."""
    clip_tokens: ClassVar[int] = 0
    """Tokens of the text sequence besides T5's."""

    @property
    @abstractmethod
    def blocks(self) -> dict[str, Block]:
        """The blocks by name."""

    @property
    @abstractmethod
    def other_layers(self) -> Layers:
        """The linear layers outside the blocks."""

    @property
    def buffers(self) -> int:
        """Numbers that the transformer holds besides its parameters."""
        return 0

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.num_attention_heads * self.attention_head_dim

    @functools.cached_property
    def layers(self) -> Layers:
        """Every linear layer by name."""
        layers = dict(self.other_layers)
        for place, block in self.blocks.items():
            layers |= _inside(place, block.layers)
        return layers

    @functools.cached_property
    def parameters(self) -> int:
        """Parameters of the transformer."""
        others = sum(layer.parameters for layer in self.other_layers.values())
        return others + sum(block.parameters for block in self.blocks.values())

    @property
    def largest_block(self) -> int:
        """Parameters of the largest block."""
        return max(block.parameters for block in self.blocks.values())

    def lora_parameters(self, config: LoraConfig) -> int:
        """Parameters of adapters on the ``target_modules`` of ``config``."""
        adapted = _adapted(self.layers, config).values()
        return config.rank * sum(layer.inputs + layer.outputs for layer in adapted)

    def rows(self, policy: PolicyConfig) -> dict[Rows, int]:
        """Tokens of one state by kind; an image token is a patch of 2x2 latents."""
        height, width = (side // (2 * self.factor) for side in policy.size)
        image = height * width
        text = self.clip_tokens + policy.max_sequence_length
        return {"image": image, "text": text, "all": image + text, "one": 1}

    def tokens(self, policy: PolicyConfig) -> int:
        """Tokens of one state, image and text."""
        return self.rows(policy)["all"]

    @functools.cached_property
    def _products(self) -> Counter[Rows]:
        """Multiplications of one row by all layers over such rows."""
        found: Counter[Rows] = Counter()
        for layer in self.layers.values():
            found[layer.rows] += layer.inputs * layer.outputs
        return found

    @functools.cached_property
    def _attentions(self) -> Counter[Rows]:
        return Counter(rows for block in self.blocks.values() for rows in block.attentions)

    def operations(self, policy: PolicyConfig) -> float:
        """Floating-point operations of one forward: matrix products and attention."""
        rows = self.rows(policy)
        products = sum(rows[kind] * count for kind, count in self._products.items())
        pairs = sum(rows[kind] ** 2 * count for kind, count in self._attentions.items())
        return 2.0 * products + 4.0 * pairs * self.width

    def kept(self, policy: PolicyConfig, lora: LoraConfig | None) -> list[float]:
        """Numbers that each block keeps from one forward for its backward.

        ``lora``: the adapters that are trained; None trains all weights.
        """
        rows = self.rows(policy)

        def of(place: str, block: Block) -> float:
            outputs = block.kept if lora is None else block.kept_frozen
            numbers = self.width * sum(rows[kind] * count for kind, count in outputs.items())
            adapted = {} if lora is None else _adapted(_inside(place, block.layers), lora)
            # Queries, keys and values have one input.
            inputs = {
                re.sub("(to|add)_[qkv]", "qkv", name): layer.inputs * rows[layer.rows]
                for name, layer in adapted.items()
            }
            return numbers + sum(inputs.values())

        return [of(place, block) for place, block in self.blocks.items()]

    def output_bytes(self, policy: PolicyConfig) -> int:
        """Bytes of a block's output in one forward."""
        return self.tokens(policy) * self.width * DTYPE_BYTES[policy.dtype]

    def embedding_bytes(self, policy: PolicyConfig) -> int:
        """Bytes of one prompt's text embeddings: the sequence and the pooled vector."""
        numbers = self.rows(policy)["text"] * self.joint_attention_dim
        return (numbers + self.pooled_projection_dim) * DTYPE_BYTES[policy.dtype]


def model_size(policy: PolicyConfig) -> ModelSize:
    """The size of a policy: of its folder, else of the catalogue; see :func:`assumption`.

    Raises:
        UserError: the folder's configuration cannot be read.
    """
    folder = _folder(policy)
    if folder is not None:
        return read_size(folder)
    known = published(policy.source, policy.pipeline)
    return size_class(known.pipeline).model_validate(known.transformer)


def check_sides(image: ImageConfig, factor: int) -> None:
    """Refuses a height or width that is not a whole number of patches.

    Raises:
        UserError: names the nearest that is.
    """
    unit = 2 * factor
    for key, side in image.sides.items():
        if side % unit:
            raise UserError(
                f"{key} {side} is not divisible by {unit} (the autoencoder's factor {factor} "
                f"times the 2x2 packing); nearest: {max(1, round(side / unit)) * unit}"
            )


def nfe_per_velocity(policy: PolicyConfig) -> int:
    """Forwards of the transformer (NFE) for one velocity."""
    return evaluations_per_velocity(pipeline_of(policy), policy.guidance_scale)


def pipeline_of(policy: PolicyConfig) -> str:
    """The class of a policy's pipeline: the configured, its folder's, or the catalogue's.

    Raises:
        UserError: its folder has a pipeline that no policy is made of.
    """
    if policy.pipeline is not None:
        return policy.pipeline
    folder = _folder(policy)
    return published(policy.source).pipeline if folder is None else pipeline_name(folder)


def assumption(policy: PolicyConfig) -> str | None:
    """What is assumed of a policy that is neither on this machine nor in the catalogue."""
    if _folder(policy) is not None or _in_catalogue(policy.source) is not None:
        return None
    return (
        f"policy {policy.source} is neither on this machine nor in the catalogue (`g2rpo weights "
        f"list`), so it is planned as {_assumed(policy.pipeline)}"
    )


def published(source: str, pipeline: str | None = None) -> PublishedPolicy:
    """What the catalogue says of a policy by its hub id, else of the one that it is taken for."""
    found = _in_catalogue(source) or _in_catalogue(_assumed(pipeline))
    assert found is not None
    return found


def _assumed(pipeline: str | None) -> str:
    """The hub id of the catalogue's first policy of ``pipeline``; without one ``ASSUMED``."""
    policies = ((a.repo, a.architecture) for a in catalogue().artifacts)
    found = (repo for repo, known in policies if known is not None and known.pipeline == pipeline)
    return next(found, ASSUMED)


def _in_catalogue(source: str) -> PublishedPolicy | None:
    found = (artifact.architecture for artifact in catalogue().of_repository(source))
    return next((each for each in found if each is not None), None)


def size_class(pipeline: str) -> type[ModelSize]:
    """The size of policies of a diffusers pipeline."""
    found: type[ModelSize] = pkgutil.resolve_name(ARCHITECTURES[pipeline].size)
    return found


@functools.cache
def read_size(folder: Path) -> ModelSize:
    """The size of the pipeline in ``folder``.

    Raises:
        UserError: its configuration cannot be read.
    """
    pipeline = pipeline_name(folder)
    try:
        transformer, autoencoder = (
            read_json(folder / part / "config.json") for part in ("transformer", "vae")
        )
        factor = 2 ** (len(autoencoder["block_out_channels"]) - 1)
        return size_class(pipeline).model_validate(transformer | {"factor": factor})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: transformer/config.json and vae/config.json are not those of a {pipeline} "
            f"({reason(error)}); fetch the folder again"
        ) from None


def _folder(policy: PolicyConfig) -> Path | None:
    """The folder of a policy, if its configuration is on this machine."""
    folder = folder_here(policy.source, policy.revision)
    files = ("model_index.json", "transformer/config.json", "vae/config.json")
    here = folder is not None and all((folder / file).is_file() for file in files)
    return folder if here else None


def _inside(place: str, layers: Layers) -> Layers:
    return {f"{place}.{name}": layer for name, layer in layers.items()}


def _adapted(layers: Layers, config: LoraConfig) -> Layers:
    ends = tuple(f".{target}" for target in config.target_modules)
    return {name: layer for name, layer in layers.items() if f".{name}".endswith(ends)}


def joint_layers(width: int) -> Layers:
    """The linear layers of a block with separate weights for image and text."""
    image, text = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj")
    layers = {f"attn.{name}": Layer(width, width, "image") for name in image}
    layers |= {f"attn.{name}": Layer(width, width, "text") for name in (*text, "to_add_out")}
    streams: tuple[tuple[str, Rows], ...] = (("", "image"), ("_context", "text"))
    for suffix, rows in streams:
        layers[f"norm1{suffix}.linear"] = Layer(width, 6 * width, "one")
        layers[f"ff{suffix}.net.0.proj"] = Layer(width, 4 * width, rows)
        layers[f"ff{suffix}.net.2"] = Layer(4 * width, width, rows)
    return layers


def time_text_layers(inputs: Mapping[str, int], width: int) -> Layers:
    """The embedders of ``time_text_embed``, by name and width of their input."""
    layers = {}
    for name, channels in inputs.items():
        layers[f"time_text_embed.{name}_embedder.linear_1"] = Layer(channels, width, "one")
        layers[f"time_text_embed.{name}_embedder.linear_2"] = Layer(width, width, "one")
    return layers
