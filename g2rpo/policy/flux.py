"""FLUX as a policy: packed latents in, velocities out, with embedded guidance.

The architecture is diffusers'. This is the part of ``FluxPipeline`` between noise and image,
without the sampling loop.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from g2rpo.errors import UserError
from g2rpo.policy.base import Policy
from g2rpo.policy.conditioning import Conditioning, TextEncoders
from g2rpo.policy.config import PolicyConfig
from g2rpo.policy.cpu_blocks import use_cpu_blocks


class FluxTextEncoders(TextEncoders):
    """CLIP, for the pooled vector, and T5, for the sequence."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> None:
        super().__init__(folder, dtype, device, max_sequence_length)
        self.clip_tokenizer, self.clip = self._load("", CLIPTokenizer, CLIPTextModel)
        self.t5_tokenizer, self.t5 = self._load("_2", T5TokenizerFast, T5EncoderModel)
        self.models = (self.clip, self.t5)
        clip_length = self.clip_tokenizer.model_max_length
        self.limits = (
            ("T5", "max_sequence_length", self.t5_tokenizer, max_sequence_length),
            ("CLIP", "its limit", self.clip_tokenizer, clip_length),
        )

    def check_fit(self, folder: Path, transformer: Mapping[str, Any]) -> None:
        widths = (self.t5.config.d_model, self.clip.config.hidden_size)
        keys = ("joint_attention_dim", "pooled_projection_dim")
        expected = tuple(transformer.get(key, own) for key, own in zip(keys, widths, strict=True))
        if widths != expected:
            raise UserError(
                f"{folder}: text encoders of widths {widths} (T5, CLIP), but the transformer "
                f"expects {expected}; they belong to different models"
            )

    def _embedded(self, prompt: str) -> Conditioning:
        clip_ids = self._ids(self.clip_tokenizer, prompt, self.clip_tokenizer.model_max_length)
        t5_ids = self._ids(self.t5_tokenizer, prompt, self.max_sequence_length)
        return Conditioning(
            prompt_embeds=self.t5(t5_ids).last_hidden_state,
            pooled_prompt_embeds=self.clip(clip_ids).pooler_output,
        )


class FluxPolicy(Policy):
    """A FLUX transformer, whose latents are packed: each 2x2 patch is one token."""

    transformer_class = FluxTransformer2DModel
    pipeline_class = FluxPipeline
    text_encoders_class = FluxTextEncoders
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    packed_channels = 4

    def __init__(
        self, config: PolicyConfig, folder: Path, transformer: Any, vae: AutoencoderKL
    ) -> None:
        super().__init__(config, folder, transformer, vae)
        _, height, width = self.latent_shape
        self.image_ids = image_position_ids(height // 2, width // 2).to(self.device)
        self._text_ids: dict[int, Tensor] = {}

    @classmethod
    def prepare_for_cpu(cls, transformer: Any) -> None:
        """See :func:`use_cpu_blocks`."""
        use_cpu_blocks(transformer)

    def pack(self, latents: Tensor) -> Tensor:
        """See :func:`pack`."""
        return pack(latents)

    def unpack(self, latents: Tensor) -> Tensor:
        """See :func:`unpack`."""
        return unpack(latents, *self.latent_shape[1:])

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See :meth:`Policy.forward`; latents are [B, tokens, 4C]."""
        dtype, device = getattr(torch, self.config.dtype), latents.device
        guidance = None
        if self.transformer_config["guidance_embeds"]:
            guidance = torch.full(
                (len(latents),), self.config.guidance_scale, dtype=torch.float32, device=device
            )
        output: Tensor = self.transformer(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            pooled_projections=conditioning.pooled_prompt_embeds.to(dtype),
            timestep=timesteps,
            img_ids=self.image_ids,
            txt_ids=self._text_position_ids(conditioning.prompt_embeds.shape[1]),
            guidance=guidance,
            return_dict=False,
        )[0]
        return output

    def _text_position_ids(self, length: int) -> Tensor:
        if length not in self._text_ids:
            self._text_ids[length] = torch.zeros(length, 3, device=self.device)
        return self._text_ids[length]


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h/2 * w/2, 4C]: each 2x2 patch becomes one token."""
    return functional.pixel_unshuffle(latents, 2).flatten(2).mT.contiguous()


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`, for latents of ``height`` and ``width``."""
    patches = tokens.mT.contiguous().unflatten(2, (height // 2, width // 2))
    return functional.pixel_shuffle(patches, 2)


def image_position_ids(height: int, width: int) -> Tensor:
    """[height * width, 3]: zero, row and column of each token, for FLUX's rotary embedding."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None, :]
    return ids.reshape(-1, 3)
