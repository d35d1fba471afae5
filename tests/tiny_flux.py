"""A FluxPipeline folder with random weights, small enough for a test, saved as diffusers saves it.

The last layers are scaled up, so that velocities and pixels have the spread of a trained model's
and a comparison between two computations of them means something.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from g2rpo.errors import UserError

WIDTH = 32
CLIP_LENGTH = 77


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE without merges: one token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer of single characters, a word's first one marked as SentencePiece does."""
    characters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    pieces += [(character, -2.0) for character in characters]
    pieces += [(f"\u2581{character}", -2.5) for character in characters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_ids=0,
        model_max_length=512,
    )


def clip_config(tokenizer: CLIPTokenizer, width: int = WIDTH) -> CLIPTextConfig:
    """A CLIP text encoder of two layers, whose projection has half its width."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_encoder(tokenizer: T5TokenizerFast, width: int = WIDTH) -> T5EncoderModel:
    """A T5 encoder of two layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def build_tiny_flux(folder: Path, seed: int = 0, guidance_embeds: bool = True) -> Path:
    """Writes the pipeline to ``folder``: 8x autoencoder, 16 latent channels, two + two blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip_tokens, t5_tokens = clip_tokenizer(), t5_tokenizer()
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=autoencoder(),
            text_encoder=CLIPTextModel(clip_config(clip_tokens)),
            tokenizer=clip_tokens,
            text_encoder_2=t5_encoder(t5_tokens),
            tokenizer_2=t5_tokens,
            transformer=_transformer(guidance_embeds),
        )
    pipeline.save_pretrained(folder)
    return folder


@torch.no_grad()
def sharpen(transformer: torch.nn.Module) -> None:
    """Makes a random transformer's velocity depend more on text, time and guidance."""
    for name, parameter in transformer.named_parameters():
        if name.startswith(("context_embedder", "time_text_embed", "norm_out")):
            parameter.mul_(3)


def _transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    sharpen(transformer)
    return transformer


@torch.no_grad()
def autoencoder() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.decoder.conv_out.weight *= 3
    return vae


def refusal(action: Callable[[], object]) -> str:
    """The one line of the UserError that ``action`` raises."""
    with pytest.raises(UserError) as caught:
        action()
    line = str(caught.value)
    assert line and "\n" not in line
    return line
