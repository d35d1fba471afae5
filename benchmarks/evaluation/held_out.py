"""Held-out sampling and scoring: an image's noise depends only on (seed, prompt, image index).

Both stages resume: existing images and scores are kept.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from PIL import Image

from benchmarks.evaluation.protocol import DiversityConfig, EvaluationConfig
from benchmarks.evaluation.scoring.engine import Scorer
from benchmarks.evaluation.scoring.items import Item
from g2rpo.data.prompts import Prompt
from g2rpo.errors import reason
from g2rpo.files import atomic_path, check_publication, remove
from g2rpo.flow.schedule import build_grid
from g2rpo.policy import Policy
from g2rpo.progress import ProgressReport
from g2rpo.rewards.base import BatchedReward
from g2rpo.sampling import sample_ode
from g2rpo.stop import StopRequest


def image_path(folder: Path, prompt: Prompt, index: int = 0) -> Path:
    """The path of image ``index`` of ``prompt``."""
    return folder / (f"{prompt.id}_{index}.png" if index else f"{prompt.id}.png")


def image_problem(path: Path) -> str | None:
    """Why a PNG file is damaged, by its own checksums; None if it is intact."""
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # Pillow raises many types for damaged files
        return f"is damaged ({reason(error)})"
    return None


def compared_images(
    prompts: Sequence[Prompt], config: DiversityConfig, scored: Path, others: Path, images: int = 1
) -> dict[str, list[Path]]:
    """The image files of each prompt for diversity: the first ``images``, scored, then others."""
    return {
        prompt.id: [
            image_path(scored if index < images else others, prompt, index)
            for index in range(config.images)
        ]
        for prompt in prompts[: config.prompts]
    }


def sample_images(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    folder: Path,
    batch: int = 64,
    index: int = 0,
) -> int:
    """Samples the images missing from ``folder`` by ODE, as PNG files.

    Returns the number sampled. An image's noise does not depend on ``batch``.

    Raises:
        Stopped: a stop was requested; finished images are kept.
    """
    missing = {prompt for prompt in prompts if not image_path(folder, prompt, index).exists()}
    grid = build_grid(config.grid, policy.image_tokens)
    with ProgressReport("sample", len(prompts), done=len(prompts) - len(missing)) as report:
        for start in range(0, len(prompts), batch):
            # Always whole batches: other batch sizes round differently.
            part = prompts[start : start + batch]
            left = [prompt for prompt in part if prompt in missing]
            if not left:
                continue
            StopRequest.obey()
            images = sample_ode(policy, part, grid, config.seed, batch, index)
            for prompt, pixels in zip(part, images, strict=True):
                if prompt in left:
                    with atomic_path(image_path(folder, prompt, index)) as temporary:
                        Image.fromarray(pixels.numpy()).save(temporary, format="PNG")
            report.advance(len(left))
    return len(missing)


def score_images(
    rewards: Mapping[str, BatchedReward],
    prompts: Sequence[Prompt],
    images: Path,
    output: Path,
    count: int = 1,
) -> pd.DataFrame:
    """Scores the ``count`` images of every prompt with every reward; writes ``output`` (Parquet).

    One row per image and reward, with :data:`benchmarks.evaluation.scoring.engine.COLUMNS`. A
    journal beside ``output`` is removed at the end.

    Raises:
        UserError: an image is missing or damaged.
        Stopped: a stop was requested; finished scores are kept.
    """
    items = [
        Item(path.stem, path, prompt.text, prompt.id, prompt.style, path.name)
        for prompt in prompts
        for path in [image_path(images, prompt, index) for index in range(count)]
    ]
    journal = output.with_name(f"{output.stem}-journal")
    scorer = Scorer(journal, items)
    scores = pd.concat(
        [scorer.score(name, model) for name, model in rewards.items()], ignore_index=True
    )
    remove(output)
    with atomic_path(output) as temporary:
        scores.to_parquet(temporary, index=False)
    check_publication()
    shutil.rmtree(journal)
    return scores


def prune_images(
    folder: Path, prompts: Sequence[Prompt], keep: int | None, images: int = 1
) -> None:
    """Deletes all ``images`` of the prompts after the first ``keep``; None keeps all."""
    if keep is None:
        return
    check_publication()
    for prompt in prompts[keep:]:
        for index in range(images):
            image_path(folder, prompt, index).unlink(missing_ok=True)
