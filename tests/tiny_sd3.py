"""A StableDiffusion3Pipeline folder with random weights, as :mod:`tiny_flux` makes them."""

from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny_flux import (
    autoencoder,
    clip_config,
    clip_tokenizer,
    sharpen,
    t5_encoder,
    t5_tokenizer,
)
from transformers import CLIPTextModelWithProjection

CLIP_WIDTHS = (16, 24)
WIDTH = 48


def build_tiny_sd3(folder: Path, seed: int = 0, *, with_t5: bool = True) -> Path:
    """Writes the pipeline to ``folder``: 8x autoencoder, 16 latent channels, three blocks.

    As in SD3.5, queries and keys are normalised and the first block has a second attention.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, clip_2, t5 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
        clip_2.pad_token = "!"  # as CLIP-G's
        encoders = [
            CLIPTextModelWithProjection(clip_config(tokenizer, width))
            for tokenizer, width in zip((clip, clip_2), CLIP_WIDTHS, strict=True)
        ]
        pipeline = StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(),
            text_encoder=encoders[0],
            tokenizer=clip,
            text_encoder_2=encoders[1],
            tokenizer_2=clip_2,
            text_encoder_3=t5_encoder(t5, WIDTH) if with_t5 else None,
            tokenizer_3=t5 if with_t5 else None,
            transformer=_transformer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def _transformer() -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=sum(CLIP_WIDTHS) // 2,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    sharpen(transformer)
    return transformer
