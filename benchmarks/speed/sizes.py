"""Sizes of the benchmark: FLUX.1-dev with random weights, the mini world, tiny models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from benchmarks.mini_world.small_policies import FluxPolicy, text_encoders
from benchmarks.mini_world.small_rewards import liven
from benchmarks.mini_world.tiny_models import build_tiny_models
from benchmarks.mini_world.tokenizers import clip_tokenizer, t5_tokenizer
from g2rpo.config import nearest, validate
from g2rpo.errors import UserError
from g2rpo.policy.flux_size import FluxSize
from g2rpo.progress import without_library_bars
from g2rpo.rewards.hps import CHECKPOINTS
from g2rpo.rewards.open_clip_reward import build_clip
from g2rpo.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "benchmarks" / "mini_world" / "assets"
PROMPT = "a large red circle on black, two blue stars above a green ring"
UNTOUCHED = 1e-12
"""Learning rate, small enough to leave the weights of every execution equal."""


FULL_TRAINING_BYTES = 2 + 4 * 5
"""Bytes of a trained parameter: bfloat16, master, gradient, AdamW's moments and temporary."""
TRAINED_SHARE = 0.75
"""Share of a GPU's memory for them; activations and the decoder take the rest."""


@dataclass(frozen=True)
class Models:
    """Paths of the models of a size.

    Attributes:
        policy: a FluxPipeline folder.
        reward: the folder of an HPS checkpoint.
        prompts: a file; its first line is the prompt.
    """

    policy: Path
    reward: Path
    prompts: Path


@dataclass(frozen=True)
class Size:
    """One size of the benchmark.

    Attributes:
        name: name of the size.
        prepare: writes the models into a folder.
        steps: denoising steps T; the first half is stochastic.
        group_size: group size G.
        granularities: the set of granularities.
        policy: policy settings, including the dtype of our execution.
        rank: rank of the adapters.
        execution: settings of our execution.
        every: the original runs every n-th (step, sample) pair; 1 runs all.
        every_batched: the batched original runs every n-th step.
        repeats: repeats of the measurement; the median is reported.
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
        """G2RPO with adapters on one prompt and HPS; ``changes`` replace whole sections."""
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
    """The shape of a FLUX pipeline; the defaults are FLUX.1-dev's.

    The text encoders have one thin layer, since embeddings are computed once.
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


def deepest_flux(memory: float, most: int = FluxShape.double_blocks) -> FluxShape:
    """FLUX.1-dev's shape with as many blocks as can be trained in ``memory`` bytes of one GPU.

    It has at most ``most`` double-stream blocks and twice as many single-stream blocks.
    """
    for double in range(most, 1, -1):
        size = FluxSize(num_layers=double, num_single_layers=2 * double, guidance_embeds=True)
        if FULL_TRAINING_BYTES * size.parameters <= TRAINED_SHARE * memory:
            return FluxShape(double_blocks=double, single_blocks=2 * double)
    return FluxShape(double_blocks=1, single_blocks=2)


def write_flux(folder: Path, shape: FluxShape, device: torch.device) -> None:
    """Saves a FluxPipeline with random bfloat16 weights to ``folder``."""
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
    widths = (shape.pooled_width, shape.joint_width)
    encoders = text_encoders(tokenizer, tokenizer_2, widths, 64, 1)
    for module in (vae, transformer, *encoders):
        module.to(torch.bfloat16)
    with without_library_bars():
        pipeline = FluxPolicy(transformer, *encoders, tokenizer, tokenizer_2).pipeline(vae)
        pipeline.save_pretrained(folder, safe_serialization=True)


def write_hps(folder: Path) -> None:
    """Saves an HPS checkpoint in its published format (float16) with random weights."""
    clip = build_clip(open_clip.get_model_config("ViT-H-14"))
    liven(clip)
    torch.save({"state_dict": clip.half().state_dict()}, folder / CHECKPOINTS["v2.1"])


def random_flux(
    folder: Path, shape: FluxShape | None = None, *, random_reward: bool = True
) -> Models:
    """Models of ``shape`` (default: FLUX.1-dev's) with random weights.

    The reward is HPS at full size with random weights, or the mini world's.
    """
    reward = MINI / "rewards" / "hps"
    if random_reward:
        reward = folder / "hps"
        reward.mkdir(parents=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            write_hps(reward)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_flux(folder / "policy", shape or FluxShape(), device)
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
            "flux", random_flux,
            steps=16, group_size=12, granularities=(1, 2, 3),
            policy={"resolution": 720, "dtype": "bfloat16"}, rank=128,
            execution={"compile": True, "training_micro_batch": 1},
            every=19, every_batched=5, repeats=1,
        ),
    )
}  # fmt: skip


def size_named(name: str, among: Sequence[str] = tuple(SIZES)) -> Size:
    """The size of that name.

    Raises:
        UserError: it is not ``among`` those that the benchmark has.
    """
    if name not in among:
        raise UserError(f"--size {name}: no such size; {nearest(name, among)}")
    return SIZES[name]
