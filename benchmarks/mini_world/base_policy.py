"""The base policy: a small FLUX with its text encoders, trained by flow matching on latents."""

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from benchmarks.mini_world import autoencoder
from benchmarks.mini_world.attribute_training import caption_shares
from benchmarks.mini_world.pictures import draw_pool
from benchmarks.mini_world.tokenizers import clip_tokenizer, t5_tokenizer
from benchmarks.mini_world.training import OneCycle
from g2rpo.config import StrictModel
from g2rpo.progress import ProgressReport
from g2rpo.rewards.attributes import AttributeReader

GUIDANCE = 3.5
SHIFT = 3.0
POOLED_TOKENS, SEQUENCE_TOKENS = 22, 20
"""Padded caption lengths of CLIP (with start and end tokens) and T5 (with an end token)."""
LATENT_CHANNELS, LATENT_SIDE = 16, 8


class PolicySettings(StrictModel):
    """Architecture and training of the base policy."""

    scenes: int = Field(default=24000, ge=1)
    steps: int = Field(default=4000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1.5e-3, gt=0)
    warmup_steps: int = Field(default=100, ge=1)
    ema_decay: float = Field(default=0.999, gt=0, lt=1)
    check_every: int = Field(default=100, ge=1)
    check_steps: int = Field(default=8, ge=1)
    """Sampling steps of the accuracy checks."""
    stop_accuracy: float = Field(default=0.73, gt=0, le=1)
    """Training stops at the first validation check with this accuracy: early, so that the policy
    errs visibly and reinforcement learning has room to improve it."""
    double_blocks: int = 2
    single_blocks: int = 3
    heads: int = 4
    head_width: int = 24
    text_width: int = 64


@dataclass
class Policy:
    """The trained modules with their tokenizers."""

    transformer: FluxTransformer2DModel
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast

    def trained(self) -> nn.ModuleDict:
        """All modules that the flow-matching loss trains."""
        return nn.ModuleDict(
            {
                "transformer": self.transformer,
                "text_encoder": self.text_encoder,
                "text_encoder_2": self.text_encoder_2,
            }
        )

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids ``[N, 22]`` and ``[N, 20]``, padded as FluxPipeline pads them."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        texts = list(captions)
        pooled = self.tokenizer(texts, max_length=POOLED_TOKENS, **options)
        sequence = self.tokenizer_2(texts, max_length=SEQUENCE_TOKENS, **options)
        return pooled.input_ids, sequence.input_ids

    def velocity(self, latents: Tensor, sigma: Tensor, tokens: tuple[Tensor, Tensor]) -> Tensor:
        """Velocity ``[B, 16, 64]`` at packed latents, time ``sigma [B]`` and token ids."""
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


def image_ids() -> Tensor:
    """Position ids ``[16, 3]`` of the packed latents, as FluxPipeline numbers them."""
    side = LATENT_SIDE // 2
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None, :]
    return ids.reshape(side * side, 3)


def pack(latents: Tensor) -> Tensor:
    """``[B, 16, 8, 8]`` to ``[B, 16, 64]``: each token is a 2 by 2 patch."""
    side = LATENT_SIDE // 2
    patches = latents.reshape(len(latents), LATENT_CHANNELS, side, 2, side, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(len(latents), side * side, -1)


def unpack(tokens: Tensor) -> Tensor:
    """Inverse of :func:`pack`."""
    side = LATENT_SIDE // 2
    patches = tokens.reshape(len(tokens), side, side, LATENT_CHANNELS, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(
        len(tokens), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE
    )


def build(settings: PolicySettings, folder: Path) -> Policy:
    """An untrained policy; writes the tokenizers below ``folder``."""
    tokenizer = clip_tokenizer(folder / "tokenizer", POOLED_TOKENS)
    tokenizer_2 = t5_tokenizer(folder / "tokenizer_2", SEQUENCE_TOKENS)
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
    return Policy(transformer, *encoders, tokenizer, tokenizer_2)


def text_encoders(
    tokenizer: CLIPTokenizer,
    tokenizer_2: T5TokenizerFast,
    widths: tuple[int, int],
    inner: int,
    layers: int,
) -> tuple[CLIPTextModel, T5EncoderModel]:
    """CLIP and T5 encoders of these output ``widths`` and ``inner`` width, with random weights."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=widths[0],
            intermediate_size=inner,
            projection_dim=widths[0],
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=widths[1],
            d_kv=inner // 8,
            d_ff=inner,
            num_layers=layers,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    return clip, t5


def shifted(u: Tensor) -> Tensor:
    """The time ``sigma`` of uniform ``u`` on the grid with shift 3."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


@torch.no_grad()
def sample(policy: Policy, captions: Sequence[str], steps: int, seed: int) -> Tensor:
    """Normalised latents ``[N, 16, 8, 8]`` by ``steps`` Euler steps on the shifted grid."""
    noise = torch.Generator().manual_seed(seed)
    shape = (len(captions), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    latents = pack(torch.randn(shape, generator=noise))
    tokens = policy.tokens(captions)
    grid = shifted(torch.linspace(1, 0, steps + 1))
    for sigma, following in itertools.pairwise(grid):
        velocity = policy.velocity(latents, sigma.expand(len(latents)), tokens)
        latents = latents + (following - sigma) * velocity
    return unpack(latents)


class MovingAverage:
    """EMA of the trained parameters, swapped in for checks."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.parameters = list(module.parameters())
        self.decay = decay
        self.steps = 0
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Adds the current parameters, with a smaller decay in the first steps."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges parameters and averages."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            present = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(present)


def train(
    settings: PolicySettings,
    seed: int,
    vae: AutoencoderKL,
    folder: Path,
    check: Callable[[Policy], float],
) -> tuple[Policy, dict[str, Any]]:
    """Trains a policy on training scenes and saves a FluxPipeline to ``folder``.

    ``check`` returns the accuracy of a policy on validation captions; it must not draw from the
    training's generators.
    """
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as tokenizers:
        policy = build(settings, Path(tokenizers))
    trained = policy.trained()
    pool = draw_pool(seed, "base-policy", "train", settings.scenes)
    latents = pack(autoencoder.encode(vae, pool.images))
    tokens = policy.tokens(pool.captions)
    del pool
    optimizer = OneCycle(
        trained.parameters(), settings.learning_rate, settings.steps,
        settings.warmup_steps / settings.steps, final_div_factor=10,
        betas=(0.9, 0.99), weight_decay=0.01, fused=True,
    )  # fmt: skip
    average = MovingAverage(trained, settings.ema_decay)
    draws = torch.Generator().manual_seed(seed)
    history: list[tuple[int, float]] = []
    running, step = 0.0, 0
    with ProgressReport("base policy", settings.steps) as progress:
        for step in range(1, settings.steps + 1):
            index = torch.randint(len(latents), (settings.batch_size,), generator=draws)
            clean = latents[index]
            noise = torch.randn(clean.shape, generator=draws)
            sigma = shifted(torch.rand(len(clean), generator=draws))
            mixed = torch.lerp(clean, noise, sigma[:, None, None])
            velocity = policy.velocity(mixed, sigma, (tokens[0][index], tokens[1][index]))
            loss = (velocity - (noise - clean)).square().mean()
            optimizer.step(loss)
            average.update()
            running = loss.item() if step == 1 else 0.99 * running + 0.01 * loss.item()
            progress.update(step, f"loss {running:.4f}")
            if step % settings.check_every == 0 or step == settings.steps:
                average.swap()
                accuracy = check(policy)
                history.append((step, round(accuracy, 4)))
                average.swap()
                progress.update(step, f"loss {running:.4f}, accuracy {accuracy:.4f}", always=True)
                if accuracy >= settings.stop_accuracy:
                    break
        seconds = progress.seconds
    average.swap()
    save(policy, vae, folder)
    return policy, {
        "parameters": {
            name: sum(p.numel() for p in module.parameters()) for name, module in trained.items()
        },
        "steps_taken": step,
        "training_loss": round(running, 5),
        "validation_accuracy": history,
        "training_seconds": round(seconds, 1),
    }


def save(policy: Policy, vae: AutoencoderKL, folder: Path) -> None:
    """Saves a standard FluxPipeline folder."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False
    )
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=policy.text_encoder,
        tokenizer=policy.tokenizer,
        text_encoder_2=policy.text_encoder_2,
        tokenizer_2=policy.tokenizer_2,
        transformer=policy.transformer,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


@dataclass(frozen=True)
class AttributeCheck:
    """Scores samples of a policy with the attribute reader, always from the same noise."""

    reader: AttributeReader
    vae: AutoencoderKL
    captions: list[str]
    steps: int
    seed: int = 0

    def shares(self, policy: Policy) -> list[float]:
        """The share of each caption's attributes that its sample shows."""
        latents = sample(policy, self.captions, self.steps, self.seed)
        return caption_shares(self.reader, autoencoder.decode(self.vae, latents), self.captions)

    def accuracy(self, policy: Policy) -> float:
        """The mean share."""
        shares = self.shares(policy)
        return sum(shares) / len(shares)

    def report(self, policy: Policy) -> dict[str, float]:
        """The mean share, and the share of images with every attribute correct."""
        shares = self.shares(policy)
        correct = sum(value == 1 for value in shares)
        return {
            "attribute_accuracy": round(sum(shares) / len(shares), 4),
            "all_right": round(correct / len(shares), 4),
        }
