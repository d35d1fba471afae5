"""Held-out sampling and scoring: images whose noise depends on (seed, prompt id) alone.

Both stages resume: an image that is there is not sampled again, a reward that has scored all
images does not score them again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from g2rpo.config import StrictModel
from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.files import atomic_path
from g2rpo.flow.schedule import GridConfig, build_grid
from g2rpo.policy import FluxPolicy
from g2rpo.progress import ProgressReport
from g2rpo.rewards.base import RewardModel
from g2rpo.sampling import sample_ode


class EvaluationConfig(StrictModel):
    """How held-out images are sampled: the named protocol that a table states."""

    name: str
    """What the protocol is called in tables."""
    split: Literal["validation", "test"] = "test"
    limit: int | None = Field(None, ge=1)
    """Uses the first so many prompts of the split; null uses all."""
    seed: int = 1223627
    """Names the noise, together with the prompt's id (the released sampler seed)."""
    grid: GridConfig = GridConfig(steps=50, schedule="flux_dynamic", timestep="exact")
    """The released evaluation: 50 steps on diffusers' own grid."""
    resolution: int = Field(1024, gt=0)
    guidance_scale: float = Field(3.5, ge=0)


def image_path(folder: Path, prompt: Prompt) -> Path:
    """Where the image of ``prompt`` is kept."""
    return folder / f"{prompt.id}.png"


def sample_images(
    policy: FluxPolicy,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    folder: Path,
    batch: int = 64,
) -> int:
    """Samples the images that ``folder`` does not have yet, by ODE, as PNG files.

    Args:
        policy: loaded at the protocol's resolution and guidance.
        prompts: the held-out prompts.
        config: the protocol.
        folder: where ``<prompt id>.png`` go.
        batch: images sampled at a time; the noise of an image does not depend on it.

    Returns:
        How many images were sampled.
    """
    missing = [prompt for prompt in prompts if not image_path(folder, prompt).exists()]
    grid = build_grid(config.grid, policy.image_tokens)
    with ProgressReport("sample", len(prompts), done=len(prompts) - len(missing)) as report:
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            images = sample_ode(policy, part, grid, config.seed, batch)
            for prompt, pixels in zip(part, images, strict=True):
                with atomic_path(image_path(folder, prompt)) as temporary:
                    Image.fromarray(pixels.numpy()).save(temporary, format="PNG")
            report.advance(len(part))
    return len(missing)


def read_images(paths: Sequence[Path]) -> Tensor:
    """Images of one size as uint8 [N, H, W, 3].

    Raises:
        UserError: a file is missing, is no image, or has another size than the first; it is named.
    """
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(torch.from_numpy(np.array(image.convert("RGB"))))
        except FileNotFoundError:
            raise UserError(f"{path}: image missing; sample it again") from None
        except OSError as error:
            raise UserError(f"{path}: not a readable image ({error}); sample it again") from None
        if images[-1].shape != images[0].shape:
            raise UserError(f"{path}: its size differs from that of {paths[0].name}")
    return torch.stack(images)


def score_images(
    rewards: Mapping[str, RewardModel],
    prompts: Sequence[Prompt],
    images: Path,
    output: Path,
    batch: int = 64,
) -> pd.DataFrame:
    """Scores every prompt's image with every reward and writes ``output`` (Parquet).

    Args:
        rewards: reward models by column name.
        prompts: the held-out prompts.
        images: the folder of ``<prompt id>.png``.
        output: the Parquet file; each reward's part is kept beside it until all are done.
        batch: images read and scored at a time.

    Returns:
        One row per image and reward: prompt_id, prompt, image, reward, version, weights_hash,
        score (float32).
    """
    parts = []
    total = len(rewards) * len(prompts)
    with ProgressReport("score", total) as report:
        for name, model in rewards.items():
            part_path = output.with_name(f"{output.stem}-{name}.parquet")
            part = _finished_part(part_path, model, prompts)
            if part is None:
                part = _score_part(name, model, prompts, images, batch)
                with atomic_path(part_path) as temporary:
                    part.to_parquet(temporary, index=False)
            parts.append(part)
            report.advance(len(prompts))
    scores = pd.concat(parts, ignore_index=True)
    with atomic_path(output) as temporary:
        scores.to_parquet(temporary, index=False)
    for name in rewards:
        output.with_name(f"{output.stem}-{name}.parquet").unlink(missing_ok=True)
    return scores


def _finished_part(
    path: Path, model: RewardModel, prompts: Sequence[Prompt]
) -> pd.DataFrame | None:
    """What an interrupted scoring left for this model and these prompts, or None."""
    if not path.exists():
        return None
    part = pd.read_parquet(path)
    same_model = set(part["weights_hash"]) == {model.weights_hash}
    same_prompts = list(part["prompt_id"]) == [prompt.id for prompt in prompts]
    return part if same_model and same_prompts else None


def _score_part(
    name: str, model: RewardModel, prompts: Sequence[Prompt], images: Path, batch: int
) -> pd.DataFrame:
    scores = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        pixels = read_images([image_path(images, prompt) for prompt in part])
        scores.append(model.score(pixels, [prompt.text for prompt in part]).numpy())
    return pd.DataFrame(
        {
            "prompt_id": [prompt.id for prompt in prompts],
            "prompt": [prompt.text for prompt in prompts],
            "image": [image_path(images, prompt).name for prompt in prompts],
            "reward": name,
            "version": model.version,
            "weights_hash": model.weights_hash,
            "score": np.concatenate(scores).astype(np.float32),
        }
    )


def prune_images(folder: Path, prompts: Sequence[Prompt], keep: int | None) -> None:
    """Keeps the images of the first ``keep`` prompts (all where it is null), deletes the rest."""
    if keep is None:
        return
    for prompt in prompts[keep:]:
        image_path(folder, prompt).unlink(missing_ok=True)
