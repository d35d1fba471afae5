"""A policy: a flow-matching image model as velocities over packed latents.

What the rollout, training, sampling, export and plans need. An architecture is a subclass with its
forward pass, its packing of latents and its text encoders (:mod:`g2rpo.policy.flux`,
:mod:`g2rpo.policy.sd3`).
"""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import AutoencoderKL
from torch import Tensor, nn

from g2rpo.batching import BatchSize
from g2rpo.errors import UserError
from g2rpo.files import atomic_folder
from g2rpo.offload import OffloadConfig, on_device
from g2rpo.policy import lora
from g2rpo.policy.architectures import evaluations_per_velocity
from g2rpo.policy.checkpoint import (
    LORA_FILE,
    CheckpointFiles,
    check_fits,
    files_at,
    read_into,
)
from g2rpo.policy.conditioning import (
    Conditioning,
    ConditioningSource,
    TextEncoders,
    joined,
    row_of,
)
from g2rpo.policy.config import ImageConfig, LoraConfig, PolicyConfig
from g2rpo.policy.decoding import decode_size, in_slices
from g2rpo.policy.folder import load_model
from g2rpo.policy.kernels import keep_freed_memory
from g2rpo.policy.size import ModelSize, check_sides, size_class
from g2rpo.progress import without_library_bars

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HybridSampling:
    """Sampling with a policy's own velocities for ``tuned_steps``, then with those of ``base``."""

    base: "Policy"
    tuned_steps: int


class Policy(ABC):
    """A transformer with its frozen autoencoder and text encoders.

    The text encoders are loaded when a prompt is first encoded. ``transformer`` may be replaced by
    a wrapper of itself (DistributedDataParallel, torch.compile); nothing here reads its attributes.

    Attributes:
        transformer: the trained part; takes packed latents.
        vae: the frozen autoencoder.
        latent_shape: (channels, height / f, width / f) of one unpacked latent, the shape of initial
            noise; f is the autoencoder's downsampling factor.
        offload: which of the frozen models are kept in CPU memory while they are not used.
        handover: the policy that finishes held-out images; None is this one.
        conditioning_source: precomputed text embeddings; missing ones are encoded here.
        text_encoders: once a prompt has been encoded here.
        unconditional: :meth:`empty` once it has been encoded; shared with copies made before.
        detach_unconditional: whether no gradient flows through the velocity of the empty prompt.
    """

    transformer_class: ClassVar[Any]
    """The transformer's class in diffusers."""
    pipeline_class: ClassVar[Any]
    """The pipeline's class in diffusers, which loads what is exported."""
    text_encoders_class: ClassVar[type[TextEncoders]]
    block_lists: ClassVar[tuple[str, ...]]
    """The transformer's lists of blocks, in order."""
    packed_channels: ClassVar[int]
    """Channels that the transformer takes for each channel of a latent."""
    has_step_cache: ClassVar[bool] = True
    """Whether :mod:`g2rpo.training.step_cache` knows the blocks."""
    has_attention_backends: ClassVar[bool] = True
    """Whether diffusers lets the attention kernel be chosen; otherwise torch chooses it."""

    def __init__(
        self, config: PolicyConfig, folder: Path, transformer: Any, vae: AutoencoderKL
    ) -> None:
        self.config = config
        self.folder = folder
        self.transformer: nn.Module = transformer
        self.vae = vae
        self.device = next(vae.parameters()).device
        self.transformer_config: dict[str, Any] = dict(transformer.config)
        vae_config = vae.config
        self._scaling_factor = float(vae_config["scaling_factor"])
        self._shift_factor = float(vae_config["shift_factor"] or 0.0)
        self._factor = factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        channels = int(vae_config["latent_channels"])
        check_sides(config, factor)
        packed = self.packed_channels * channels
        if self.transformer_config["in_channels"] != packed:
            raise UserError(
                f"{folder}: the transformer takes {self.transformer_config['in_channels']} "
                f"channels but the autoencoder's packed latents have {packed}; "
                "they belong to different models"
            )
        height, width = config.size
        self.latent_shape: tuple[int, int, int] = (channels, height // factor, width // factor)
        self.handover: HybridSampling | None = None
        self.offload = OffloadConfig()
        self.conditioning_source: ConditioningSource | None = None
        self._warned_missing = False
        self.text_encoders: TextEncoders | None = None
        self.unconditional: list[Conditioning] = []
        self.detach_unconditional = False

    @classmethod
    def load(
        cls, config: PolicyConfig, folder: Path, device: torch.device, *, weights: bool = True
    ) -> Self:
        """Loads transformer and autoencoder of ``folder`` onto ``device`` in ``config.dtype``.

        Without ``weights`` the transformer stays on the meta device, in float32 or more, to be
        sharded before :meth:`fill_transformer`.

        Raises:
            UserError: a part cannot be read, they do not fit together, or images of this size
                cannot be packed.
        """
        dtype = getattr(torch, config.dtype)
        vae = load_model(AutoencoderKL, folder / "vae", torch_dtype=dtype)
        if weights:
            transformer = cls._read_transformer(config, folder, device)
        else:
            transformer = cls.empty_transformer(config, folder)
        vae.requires_grad_(False).to(device)
        if device.type == "cpu":
            keep_freed_memory()
            vae.to(memory_format=torch.channels_last)  # convolutions are a quarter faster
        return cls(config, folder, transformer, vae)

    @property
    def image_tokens(self) -> int:
        """Image tokens in the transformer."""
        return self.latent_shape[1] * self.latent_shape[2] // 4

    @property
    def model_size(self) -> ModelSize:
        """The size of the transformer and the autoencoder."""
        kind = size_class(self.pipeline_class.__name__)
        return kind.model_validate(self.transformer_config | {"factor": self._factor})

    @property
    def evaluations_per_velocity(self) -> int:
        """Forwards of the transformer (NFE) for one velocity; 2 with classifier-free guidance."""
        return evaluations_per_velocity(self.pipeline_class.__name__, self.config.guidance_scale)

    # Text

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The text embeddings of P prompts, equal to the pipeline's ``encode_prompt``.

        Each is a function of its prompt alone, in every bit. The text encoders are only loaded for
        prompts that ``conditioning_source`` lacks. Logs a warning for truncated prompts.

        Raises:
            UserError: the text encoders cannot be read or do not fit the transformer.
        """
        if self.evaluations_per_velocity > 1:
            self.empty()
        return self._read(prompts)

    def empty(self) -> Conditioning:
        """The text embeddings of the empty prompt, [1, ...], encoded once.

        Guidance moves away from the velocity that they give, as the pipeline's does without a
        negative prompt.
        """
        if not self.unconditional:
            self.unconditional.append(self._read([""]))
        return self.unconditional[0]

    def _read(self, prompts: Sequence[str]) -> Conditioning:
        """The text embeddings, from ``conditioning_source`` where it has them."""
        if self.conditioning_source is None:
            return self._encode(prompts)
        rows = dict(self.conditioning_source.read(prompts))
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in rows]
        if missing:
            if not self._warned_missing:
                self._warned_missing = True
                logger.warning(
                    "%d of %d prompts are not in the embedding cache: loading the text encoders; "
                    "first: %.80r",
                    len(missing), len(prompts), missing[0],
                )  # fmt: skip
            encoded = self._encode(missing)
            rows |= {prompt: row_of(encoded, index) for index, prompt in enumerate(missing)}
        return joined([rows[prompt] for prompt in prompts], self.device)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        encoders = self._encoders()
        away = self.offload.text_encoders
        with on_device(encoders.models, self.device, offloaded=away):
            return encoders.encode(prompts)

    def _encoders(self) -> TextEncoders:
        if self.text_encoders is None:
            encoders = self.text_encoders_class(
                self.folder,
                getattr(torch, self.config.dtype),
                self.device,
                self.config.max_sequence_length,
            )
            encoders.check_fit(self.folder, self.transformer_config)
            self.text_encoders = encoders
        return self.text_encoders

    # Latents

    def pack(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] as the transformer takes them; by default as they are."""
        return latents

    def unpack(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`pack`, for latents of this policy's ``latent_shape``."""
        return latents

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity, pointing from the image to the noise.

        With classifier-free guidance of scale w this is v_u + w (v_c - v_u), of one forward for the
        empty prompt and ``conditioning``, added in the transformer's dtype as the pipeline does. A
        gradient flows through both, unless ``detach_unconditional``.

        Takes packed latents [B, ...] at ``timesteps`` [B] in [0, 1]; returns float32, or float64
        for float64 latents. Does not synchronise with the device.
        """
        if self.evaluations_per_velocity == 1:
            output = self.forward(latents, timesteps, conditioning)
        else:
            empty = self.empty().expand(len(latents))
            if self.detach_unconditional and torch.is_grad_enabled():
                # In a forward of its own, so that nothing of it is kept for a backward.
                with torch.no_grad():
                    without = self.forward(latents, timesteps, empty)
                given = self.forward(latents, timesteps, conditioning)
            else:
                texts = Conditioning.cat([empty, conditioning])
                twice, times = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
                without, given = self.forward(twice, times, texts).chunk(2)
            output = without + self.config.guidance_scale * (given - without)
        return output.to(torch.promote_types(latents.dtype, torch.float32))

    @abstractmethod
    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's output in its dtype, [B, ...]; see :meth:`velocity`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes packed latents [B, ...] at sigma = 0 to uint8 [B, H, W, 3] on the CPU.

        The pixels equal those of a PNG of the pipeline's output.
        """
        empty = torch.empty(0, *self.config.size, 3, dtype=torch.uint8)
        return torch.cat([empty, *self.decode_slices(latents)])

    @torch.no_grad()
    def decode_slices(self, latents: Tensor, size: BatchSize | None = None) -> Iterator[Tensor]:
        """Like :meth:`decode`, slice by slice (:func:`g2rpo.policy.decoding.in_slices`).

        Decodes ``size`` images at once, without tiling; ``size`` is halved on running out of
        memory.
        """
        size = size or decode_size(self.config.pixels)
        with on_device([self.vae], self.device, offloaded=self.offload.vae):
            yield from in_slices(self._pixels, latents, size)

    def _pixels(self, latents: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] of packed latents, on their device."""
        scaled = self.unpack(latents) / self._scaling_factor + self._shift_factor
        dtype = next(self.vae.parameters()).dtype
        decoded: Tensor = self.vae.decode(scaled.to(dtype), return_dict=False)[0]
        # Scaled and clamped in the autoencoder's dtype, rounded in float32, as in diffusers'
        # VaeImageProcessor: another order gives other bytes in bfloat16.
        pixels = ((decoded * 0.5 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1)

    # Weights

    def save_transformer(self, folder: Path) -> None:
        """Writes the transformer as a standard diffusers ``transformer/`` folder, atomically."""
        with atomic_folder(folder) as temporary, without_library_bars():
            self._unwrapped().save_pretrained(temporary)

    def load_transformer(self, path: Path) -> None:
        """Loads fine-tuned transformer weights over the current ones, in place.

        ``path``: a diffusers ``transformer/`` folder, a pipeline folder that has one, or a
        safetensors file of a whole transformer. See :meth:`load_checkpoint`.
        """
        self.load_checkpoint(files_at(path, str(path)))

    def load_checkpoint(self, files: CheckpointFiles) -> None:
        """Loads the weights of a checkpoint over the current ones, in place; adds those of a LoRA.

        Raises:
            UserError: the weights are incomplete or unreadable, or of another architecture than the
                base; nothing is changed.
        """
        transformer = self._unwrapped()
        check_fits(files, transformer, self.transformer_config, self.folder)
        if files.is_lora:
            lora.load_lora(transformer, files)
        else:
            read_into(transformer.state_dict(), files)

    def fill_transformer(self) -> None:
        """Reads the base's weights into the current transformer, each rank its own part.

        They are rounded to ``config.dtype`` first, so that a float32 transformer starts from the
        same values as one in ``config.dtype``.

        Raises:
            UserError: see :meth:`load_checkpoint`.
        """
        files = files_at(self.folder / "transformer", str(self.folder))
        rounding = getattr(torch, self.config.dtype)
        read_into(self._unwrapped().state_dict(), files, rounding)

    # Adapters

    def add_lora(self, config: LoraConfig, seed: int = 0) -> None:
        """Freezes the transformer and adds trainable adapters (:func:`lora.add_lora`)."""
        lora.add_lora(self._unwrapped(), config, seed)

    @property
    def has_lora(self) -> bool:
        """Whether the transformer has adapters."""
        return bool(lora.lora_parameters(self._unwrapped()))

    def save_lora(self, folder: Path) -> None:
        """Writes the adapters as a LoRA file that the pipeline loads, atomically."""
        with atomic_folder(folder) as temporary:
            lora.save_lora(self._unwrapped(), temporary, self.pipeline_class)

    def load_lora(self, folder: Path) -> None:
        """Reads adapters written by :meth:`save_lora`; adds them if there are none.

        Raises:
            UserError: the file is missing or damaged, or does not fit.
        """
        path = folder / LORA_FILE
        lora.load_lora(self._unwrapped(), CheckpointFiles(str(path), (path,), None))

    def lora_disabled(self) -> AbstractContextManager[None]:
        """A context in which the transformer is its frozen base."""
        return lora.lora_disabled(self._unwrapped())

    def with_base_transformer(self) -> Self:
        """The untrained policy: the base's transformer, loaded again, with everything else shared.

        Loaded rather than copied: on the CPU the last bit of a velocity depends on the memory
        alignment of the weights, and two policies loaded from the same files agree in every bit.
        """
        other = copy.copy(self)
        other.handover = None
        other.transformer = self._read_transformer(self.config, self.folder, self.device)
        return other

    def at(self, images: ImageConfig) -> Self:
        """This policy at the size and guidance of ``images``; weights and encoders are shared.

        Raises:
            UserError: images of this size cannot be packed.
        """
        transformer: Any = self.transformer
        other = type(self)(self.config.at(images), self.folder, transformer, self.vae)
        other.offload, other.conditioning_source = self.offload, self.conditioning_source
        other.text_encoders, other.unconditional = self.text_encoders, self.unconditional
        return other

    def guided(self, scale: float, *, detach_unconditional: bool = False) -> Self:
        """This policy with another guidance; everything else is shared.

        Raises:
            UserError: ``detach_unconditional`` without classifier-free guidance.
        """
        if (scale, detach_unconditional) == (self.config.guidance_scale, self.detach_unconditional):
            return self
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"guidance_scale": scale})
        other.detach_unconditional = detach_unconditional
        if detach_unconditional and other.evaluations_per_velocity == 1:
            raise UserError(
                "guidance.detach_unconditional needs classifier-free guidance, which this "
                f"{self.pipeline_class.__name__} does not have at a guidance scale of {scale:g}; "
                "remove it"
            )
        return other

    @classmethod
    def _read_transformer(cls, config: PolicyConfig, folder: Path, device: torch.device) -> Any:
        dtype = getattr(torch, config.dtype)
        transformer = load_model(cls.transformer_class, folder / "transformer", torch_dtype=dtype)
        if device.type == "cpu" and dtype == torch.float32:
            cls.prepare_for_cpu(transformer)
        return transformer.to(device)

    @classmethod
    def prepare_for_cpu(cls, transformer: Any) -> None:
        """Makes a float32 transformer on the CPU faster, in place; by default it stays as it is."""
        del transformer

    @classmethod
    def empty_transformer(cls, config: PolicyConfig, folder: Path) -> Any:
        """The transformer of ``folder`` on the meta device, in float32 or more."""
        kind = cls.transformer_class
        settings = kind.load_config(folder / "transformer", local_files_only=True)
        dtype = torch.promote_types(getattr(torch, config.dtype), torch.float32)
        with torch.device("meta"):
            transformer = kind.from_config(settings).eval()
        return transformer if dtype == torch.float32 else transformer.to(dtype)

    def _unwrapped(self) -> Any:
        return extract_model_from_parallel(self.transformer, keep_torch_compile=False)
