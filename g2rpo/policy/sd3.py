"""Stable Diffusion 3 and 3.5 as a policy: latents [B, 16, h, w] in, velocities out.

The architecture is diffusers'. This is the part of ``StableDiffusion3Pipeline`` between noise and
image, without the sampling loop.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from g2rpo.errors import UserError
from g2rpo.files import read_json
from g2rpo.policy.architectures import text_endings
from g2rpo.policy.base import Policy
from g2rpo.policy.conditioning import Conditioning, TextEncoders
from g2rpo.policy.config import PolicyConfig

TIME_SCALE = 1000.0
"""The transformer's times run from 0 to this, where :meth:`Policy.velocity` takes 0 to 1."""


class SD3TextEncoders(TextEncoders):
    """CLIP-L, CLIP-G and T5, of which the pipeline may leave out T5.

    The sequence is CLIP's tokens, the hidden states of both side by side and zeros up to T5's
    width, and then T5's; without T5 these are zero. The pooled vector is both CLIP projections.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> None:
        super().__init__(folder, dtype, device, max_sequence_length)
        endings, clip = text_endings(folder), (CLIPTokenizer, CLIPTextModelWithProjection)
        self.clips = tuple(self._load(ending, *clip) for ending in endings if ending != "_3")
        self.t5 = self._load("_3", T5TokenizerFast, T5EncoderModel) if "_3" in endings else None
        config = read_json(folder / "transformer" / "config.json")
        self.width = int(config.get("joint_attention_dim", 4096))
        # The pipeline cuts both CLIP sequences at the first tokenizer's limit.
        self.clip_length = int(self.clips[0][0].model_max_length)
        self.models = tuple(encoder for _, encoder in self.clips)
        self.limits = (("CLIP", "its limit", self.clips[0][0], self.clip_length),)
        if self.t5 is not None:
            self.models = (*self.models, self.t5[1])
            t5_limit = ("T5", "max_sequence_length", self.t5[0], max_sequence_length)
            self.limits = (t5_limit, *self.limits)

    def check_fit(self, folder: Path, transformer: Mapping[str, Any]) -> None:
        clips = [encoder.config for _, encoder in self.clips]
        sequence = self.width if self.t5 is None else self.t5[1].config.d_model
        widths = (sequence, sum(config.projection_dim for config in clips))
        keys = ("joint_attention_dim", "pooled_projection_dim")
        expected = tuple(transformer.get(key, own) for key, own in zip(keys, widths, strict=True))
        together = sum(config.hidden_size for config in clips)
        if widths != expected or together > sequence:
            raise UserError(
                f"{folder}: text encoders of widths {widths} (T5, both CLIP projections; CLIP's "
                f"hidden states have {together}), but the transformer expects {expected}; they "
                "belong to different models"
            )

    def _embedded(self, prompt: str) -> Conditioning:
        outputs = [
            encoder(self._ids(tokenizer, prompt, self.clip_length), output_hidden_states=True)
            for tokenizer, encoder in self.clips
        ]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        clip = functional.pad(clip, (0, self.width - clip.shape[-1]))
        if self.t5 is None:
            t5 = clip.new_zeros(1, self.max_sequence_length, self.width)
        else:
            tokenizer, encoder = self.t5
            t5 = encoder(self._ids(tokenizer, prompt, self.max_sequence_length)).last_hidden_state
        return Conditioning(
            prompt_embeds=torch.cat([clip, t5], dim=1),
            pooled_prompt_embeds=torch.cat([output.text_embeds for output in outputs], dim=-1),
        )


class SD3Policy(Policy):
    """An SD3 transformer, which takes latents as the autoencoder has them."""

    transformer_class = SD3Transformer2DModel
    pipeline_class = StableDiffusion3Pipeline
    text_encoders_class = SD3TextEncoders
    block_lists = ("transformer_blocks",)
    packed_channels = 1
    has_step_cache = False
    has_attention_backends = False

    def __init__(
        self, config: PolicyConfig, folder: Path, transformer: Any, vae: AutoencoderKL
    ) -> None:
        super().__init__(config, folder, transformer, vae)
        patch, most = (self.transformer_config[k] for k in ("patch_size", "pos_embed_max_size"))
        largest = patch * most * config.size[0] // self.latent_shape[1]
        for key, side in config.sides.items():
            if side > largest:
                raise UserError(
                    f"{key} {side} is more than the {largest} that the position embedding "
                    f"of {folder} covers"
                )

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See :meth:`Policy.forward`; latents are [B, C, h, w]."""
        dtype = getattr(torch, self.config.dtype)
        output: Tensor = self.transformer(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            pooled_projections=conditioning.pooled_prompt_embeds.to(dtype),
            timestep=timesteps * TIME_SCALE,
            return_dict=False,
        )[0]
        return output
