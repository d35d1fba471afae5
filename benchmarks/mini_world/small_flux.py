"""A small FLUX with its text encoders, untrained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
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
    scheduler,
)
from benchmarks.mini_world.tokenizers import clip_tokenizer, t5_tokenizer, token_ids

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
            img_ids=image_ids(),
            return_dict=False,
        )[0]
        return velocity

    def pack(self, latents: Tensor) -> Tensor:
        """``[B, 16, 8, 8]`` to ``[B, 16, 64]``: each token is a 2 by 2 patch."""
        side = LATENT_SIDE // 2
        patches = latents.reshape(len(latents), LATENT_CHANNELS, side, 2, side, 2)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(len(latents), side * side, -1)

    def unpack(self, latents: Tensor) -> Tensor:
        """Inverse of :meth:`pack`."""
        side = LATENT_SIDE // 2
        patches = latents.reshape(len(latents), side, side, LATENT_CHANNELS, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(
            len(latents), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE
        )

    def pipeline(self, vae: AutoencoderKL) -> FluxPipeline:
        """See :meth:`Policy.pipeline`."""
        return FluxPipeline(
            scheduler=scheduler(),
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            transformer=self.transformer,
        )


def image_ids() -> Tensor:
    """Position ids ``[16, 3]`` of the packed latents, as FluxPipeline numbers them."""
    side = LATENT_SIDE // 2
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None, :]
    return ids.reshape(side * side, 3)


def build(settings: FluxSettings, folder: Path) -> FluxPolicy:
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
