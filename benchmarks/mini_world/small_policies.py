"""A small FLUX and a small Stable Diffusion 3.5 with their text encoders, untrained."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from benchmarks.mini_world.base_policy import (
    CLIP_TOKENS,
    LATENT_CHANNELS,
    LATENT_SIDE,
    T5_TOKENS,
    Policy,
    PolicySettings,
)
from benchmarks.mini_world.tokenizers import clip_tokenizer, t5_tokenizer, token_ids
from g2rpo.policy.flux import image_position_ids, pack, unpack

GUIDANCE = 3.5


class FluxSettings(PolicySettings):
    """Architecture and training of the FLUX policy."""

    double_blocks: int = 2
    single_blocks: int = 3
    heads: int = 4
    head_width: int = 24
    text_width: int = 64


@dataclass
class FluxPolicy(Policy):
    """The trained modules with their tokenizers; latents are packed, ``[B, 16, 64]``."""

    kind = FluxPipeline
    transformer: FluxTransformer2DModel
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids ``[N, 22]`` and ``[N, 20]``, padded as FluxPipeline pads them."""
        return (
            token_ids(self.tokenizer, captions, CLIP_TOKENS),
            token_ids(self.tokenizer_2, captions, T5_TOKENS),
        )

    def velocity(self, latents: Tensor, sigma: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
        """See :meth:`Policy.velocity`."""
        sequence = self.text_encoder_2(tokens[1]).last_hidden_state
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=sigma,
            guidance=torch.full_like(sigma, GUIDANCE),
            pooled_projections=self.text_encoder(tokens[0]).pooler_output,
            encoder_hidden_states=sequence,
            txt_ids=torch.zeros(sequence.shape[1], 3),
            img_ids=image_position_ids(LATENT_SIDE // 2, LATENT_SIDE // 2),
            return_dict=False,
        )[0]
        return velocity

    def pack(self, latents: Tensor) -> Tensor:
        """``[B, 16, 8, 8]`` to ``[B, 16, 64]``: each token is a 2 by 2 patch."""
        return pack(latents)

    def unpack(self, latents: Tensor) -> Tensor:
        """Inverse of :meth:`pack`."""
        return unpack(latents, LATENT_SIDE, LATENT_SIDE)


def build_flux(settings: FluxSettings, folder: Path) -> FluxPolicy:
    """An untrained policy; writes the tokenizers below ``folder``."""
    tokenizer = clip_tokenizer(folder / "tokenizer", CLIP_TOKENS)
    tokenizer_2 = t5_tokenizer(folder / "tokenizer_2", T5_TOKENS)
    width = settings.text_width
    encoders = text_encoders(tokenizer, tokenizer_2, (width, width), 2 * width, 2)
    rest = settings.head_width - 4
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=settings.double_blocks,
        num_single_layers=settings.single_blocks,
        attention_head_dim=settings.head_width,
        num_attention_heads=settings.heads,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        guidance_embeds=True,
        axes_dims_rope=(4, rest // 2, rest // 2),
    )
    return FluxPolicy(transformer, *encoders, tokenizer, tokenizer_2)


class SD3Settings(PolicySettings):
    """Architecture and training of the SD3 policy."""

    blocks: int = 3
    dual_attention_blocks: int = 2
    """The first blocks have a second attention over the image alone, as in SD3.5-medium."""
    heads: int = 4
    head_width: int = 24
    clip_width: int = 32
    """Width of each CLIP encoder; T5's is twice that."""
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the captions that are replaced by the empty one, for classifier-free guidance."""
    guidance_scale: float = Field(default=3.5, ge=1)
    """Of the accuracy checks."""


@dataclass
class SD3Policy(Policy):
    """The trained modules with their tokenizers; latents are ``[B, 16, 8, 8]``."""

    kind = StableDiffusion3Pipeline
    transformer: SD3Transformer2DModel
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    text_encoder_3: T5EncoderModel
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    tokenizer_3: T5TokenizerFast
    settings: SD3Settings

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Token ids ``[N, 22]`` twice and ``[N, 20]``, padded as the pipeline pads them."""
        return (
            token_ids(self.tokenizer, captions, CLIP_TOKENS),
            token_ids(self.tokenizer_2, captions, CLIP_TOKENS),
            token_ids(self.tokenizer_3, captions, T5_TOKENS),
        )

    @functools.cached_property
    def empty(self) -> tuple[Tensor, ...]:
        """Token ids of the empty caption."""
        return self.tokens([""])

    def drop(self, tokens: tuple[Tensor, ...], draws: torch.Generator) -> tuple[Tensor, ...]:
        """See :meth:`Policy.drop`."""
        dropped = torch.rand(len(tokens[0]), 1, generator=draws) < self.settings.caption_dropout
        pairs = zip(self.empty, tokens, strict=True)
        return tuple(torch.where(dropped, empty, ids) for empty, ids in pairs)

    def velocity(self, latents: Tensor, sigma: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
        """See :meth:`Policy.velocity`."""
        clips = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip((self.text_encoder, self.text_encoder_2), tokens, strict=False)
        ]
        t5 = self.text_encoder_3(tokens[2]).last_hidden_state
        clip = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)
        clip = functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=1000 * sigma,
            pooled_projections=torch.cat([output.text_embeds for output in clips], dim=-1),
            encoder_hidden_states=torch.cat([clip, t5], dim=1),
            return_dict=False,
        )[0]
        return velocity

    def guided(self, latents: Tensor, sigma: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
        """The velocity with classifier-free guidance."""
        empty = tuple(ids.expand(len(latents), -1) for ids in self.empty)
        given = self.velocity(latents, sigma, tokens)
        without = self.velocity(latents, sigma, empty)
        return without + self.settings.guidance_scale * (given - without)


def build_sd3(settings: SD3Settings, folder: Path) -> SD3Policy:
    """An untrained policy; writes the tokenizers below ``folder``."""
    tokenizer = clip_tokenizer(folder / "tokenizer", CLIP_TOKENS)
    tokenizer_2 = clip_tokenizer(folder / "tokenizer_2", CLIP_TOKENS)
    tokenizer_3 = t5_tokenizer(folder / "tokenizer_3", T5_TOKENS)
    width = settings.clip_width
    clip, clip_2 = (
        CLIPTextModelWithProjection(clip_config(tokenizer, width, 2 * width, 2)) for _ in range(2)
    )
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        num_layers=settings.blocks,
        attention_head_dim=settings.head_width,
        num_attention_heads=settings.heads,
        joint_attention_dim=2 * width,
        caption_projection_dim=settings.heads * settings.head_width,
        pooled_projection_dim=2 * width,
        pos_embed_max_size=LATENT_SIDE,
        dual_attention_layers=tuple(range(settings.dual_attention_blocks)),
        qk_norm="rms_norm",
    )
    t5 = t5_encoder(tokenizer_3, 2 * width, 4 * width, 2)
    return SD3Policy(transformer, clip, clip_2, t5, tokenizer, tokenizer_2, tokenizer_3, settings)


def text_encoders(
    tokenizer: CLIPTokenizer,
    tokenizer_2: T5TokenizerFast,
    widths: tuple[int, int],
    inner: int,
    layers: int,
) -> tuple[CLIPTextModel, T5EncoderModel]:
    """CLIP and T5 encoders of these output ``widths`` and ``inner`` width, with random weights."""
    clip = CLIPTextModel(clip_config(tokenizer, widths[0], inner, layers))
    return clip, t5_encoder(tokenizer_2, widths[1], inner, layers)


def clip_config(tokenizer: CLIPTokenizer, width: int, inner: int, layers: int) -> CLIPTextConfig:
    """The configuration of a CLIP text encoder."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_encoder(tokenizer: T5TokenizerFast, width: int, inner: int, layers: int) -> T5EncoderModel:
    """A T5 encoder with random weights."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=inner // 8,
            d_ff=inner,
            num_layers=layers,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
