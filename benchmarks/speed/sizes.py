"""The sizes at which an iteration is timed: FLUX.1-dev's at random, the mini world, a toy."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from benchmarks.mini_world.small_rewards import liven
from benchmarks.mini_world.tiny_models import build_tiny_models
from benchmarks.mini_world.tokenizers import clip_tokenizer, t5_tokenizer
from g2rpo.config import validate
from g2rpo.progress import without_library_bars
from g2rpo.rewards.hps import CHECKPOINTS
from g2rpo.rewards.open_clip_reward import build_clip
from g2rpo.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "benchmarks" / "mini_world" / "assets"
PROMPT = "a large red circle on black, two blue stars above a green ring"
UNTOUCHED = 1e-12
"""The learning rate: small enough that every execution sees the same weights."""


@dataclass(frozen=True)
class Models:
    """Where the models of a size are.

    Attributes:
        policy: a FluxPipeline folder.
        reward: the folder of an HPS checkpoint.
        prompts: a file whose first line is the prompt.
    """

    policy: Path
    reward: Path
    prompts: Path


@dataclass(frozen=True)
class Size:
    """What is timed.

    Attributes:
        name: of the size.
        prepare: makes the models in a folder.
        steps: denoising steps T; the first half is stochastic.
        group_size: G.
        granularities: the set of granularities.
        policy: settings of the policy, its dtype in our execution among them.
        rank: of the adapters.
        execution: settings of our execution.
        every: of the original's (step, sample) pairs one in so many is run; 1 runs all.
        every_batched: of its steps, where it is batched.
        repeats: how often all is run; the median counts.
    """

    name: str
    prepare: Callable[[Path], Models]
    steps: int
    group_size: int
    granularities: tuple[int, ...]
    policy: dict[str, Any]
    rank: int
    execution: dict[str, Any] = field(default_factory=dict)
    every: int = 1
    every_batched: int = 1
    repeats: int = 3

    def config(self, models: Models, **changes: Any) -> TrainConfig:
        """One prompt of G2RPO on HPS, training adapters; ``changes`` replace whole sections."""
        data: dict[str, Any] = {
            "policy": self.policy | {"source": str(models.policy)},
            "prompts": {"file": str(models.prompts)},
            "rewards": {"hps": {"reward": {"model": "hps", "source": str(models.reward)}}},
            "grid": {"steps": self.steps, "shift": 3.0, "timestep": "truncated"},
            "method": {"name": "g2rpo", "eta": 0.7, "granularities": self.granularities},
            "lora": {"rank": self.rank, "alpha": 2.0 * self.rank},
            "rollout": {"group_size": self.group_size, "prompts_per_iteration": 1},
            "optimization": {"learning_rate": UNTOUCHED, "iterations": 4},
            "execution": {"trackers": [], "overlap_rewards": False} | self.execution,
        }
        return validate(TrainConfig, data | changes, f"size {self.name}")


def _mini(folder: Path) -> Models:
    del folder
    return Models(MINI / "policy", MINI / "rewards" / "hps", MINI / "prompts" / "validation.txt")


def _tiny(folder: Path) -> Models:
    built = build_tiny_models(folder / "tiny")
    return Models(built / "policy", built / "rewards" / "hps", built / "prompts" / "train.txt")


@dataclass(frozen=True)
class FluxShape:
    """The shape of a FLUX pipeline; FLUX.1-dev's unless told otherwise.

    The text encoders have its widths and one thin layer: their embeddings are computed once.
    """

    double_blocks: int = 19
    single_blocks: int = 38
    heads: int = 24
    head_width: int = 128
    joint_width: int = 4096
    pooled_width: int = 768
    text_tokens: int = 512
    channels: tuple[int, ...] = (128, 256, 512, 512)
    norm_groups: int = 32


def write_flux(folder: Path, shape: FluxShape, device: torch.device) -> None:
    """A FluxPipeline folder with random weights in bfloat16."""
    with torch.random.fork_rng(), torch.device(device), without_library_bars():
        torch.manual_seed(0)
        head = shape.head_width
        transformer = FluxTransformer2DModel(
            num_layers=shape.double_blocks,
            num_single_layers=shape.single_blocks,
            num_attention_heads=shape.heads,
            attention_head_dim=head,
            joint_attention_dim=shape.joint_width,
            pooled_projection_dim=shape.pooled_width,
            guidance_embeds=True,
            axes_dims_rope=(head // 8, *[head * 7 // 16] * 2),
        )
        count = len(shape.channels)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * count,
            up_block_types=("UpDecoderBlock2D",) * count,
            block_out_channels=shape.channels,
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=shape.norm_groups,
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    tokenizer = clip_tokenizer(folder / "tokenizer", 77)
    tokenizer_2 = t5_tokenizer(folder / "tokenizer_2", shape.text_tokens)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=shape.pooled_width, intermediate_size=64,
            num_hidden_layers=1, num_attention_heads=4, projection_dim=shape.pooled_width,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2), d_model=shape.joint_width, d_kv=16, d_ff=64,
            num_layers=1, num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )
    )  # fmt: skip
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae, text_encoder=clip, tokenizer=tokenizer, text_encoder_2=t5,
        tokenizer_2=tokenizer_2, transformer=transformer,
    )  # fmt: skip
    with without_library_bars():
        pipeline.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)


def write_hps(folder: Path) -> None:
    """HPS's checkpoint as it is published, a ``state_dict`` in float16, with random weights."""
    clip = build_clip(open_clip.get_model_config("ViT-H-14"))
    liven(clip)
    torch.save({"state_dict": clip.half().state_dict()}, folder / CHECKPOINTS["v2.1"])


def _random_flux(folder: Path, shape: FluxShape) -> Models:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reward = folder / "hps"
    reward.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        write_hps(reward)
    write_flux(folder / "policy", shape, device)
    prompts = folder / "prompts.txt"
    prompts.write_text(PROMPT + "\n")
    return Models(folder / "policy", reward, prompts)


SIZES = {
    size.name: size
    for size in (
        Size(
            "tiny", _tiny, steps=6, group_size=3, granularities=(1, 2),
            policy={"resolution": 32, "max_sequence_length": 20}, rank=4,
        ),
        Size(
            "mini", _mini, steps=16, group_size=12, granularities=(1, 2, 3),
            policy={"resolution": 32, "max_sequence_length": 20}, rank=16,
            execution={"rollout_micro_batch": 64, "training_micro_batch": 64},
        ),
        Size(
            "flux", functools.partial(_random_flux, shape=FluxShape()),
            steps=16, group_size=12, granularities=(1, 2, 3),
            policy={"resolution": 720, "dtype": "bfloat16"}, rank=128,
            execution={"compile": True, "training_micro_batch": 1},
            every=19, every_batched=5, repeats=1,
        ),
    )
}  # fmt: skip
