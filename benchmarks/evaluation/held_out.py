"""Held-out sampling and scoring: images whose noise depends on (seed, prompt, image) alone.

Both stages resume: an image that is there is not sampled again, nor is a score taken again.
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
from g2rpo.files import atomic_path, check_publication, remove
from g2rpo.flow.schedule import build_grid
from g2rpo.policy import FluxPolicy
from g2rpo.progress import ProgressReport
from g2rpo.rewards.base import BatchedReward
from g2rpo.sampling import sample_ode
from g2rpo.stop import StopRequest


def image_path(folder: Path, prompt: Prompt, index: int = 0) -> Path:
    """Where image ``index`` of ``prompt`` is kept; the first is the one that is scored."""
    return folder / (f"{prompt.id}_{index}.png" if index else f"{prompt.id}.png")


def image_problem(path: Path) -> str | None:
    """What is wrong with a PNG file by the checksums of its own format; None where nothing is."""
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # damaged bytes make Pillow raise errors of many kinds
        return f"is damaged ({' '.join(str(error).split())[:200]})"
    return None


def compared_images(
    prompts: Sequence[Prompt], config: DiversityConfig, scored: Path, others: Path
) -> dict[str, list[Path]]:
    """For each prompt id the files whose diversity is measured: the scored one, then the others."""
    return {
        prompt.id: [
            image_path(scored, prompt),
            *(image_path(others, prompt, index) for index in range(1, config.images)),
        ]
        for prompt in prompts[: config.prompts]
    }


def sample_images(
    policy: FluxPolicy,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    folder: Path,
    batch: int = 64,
    index: int = 0,
) -> int:
    """Samples the images that ``folder`` does not have yet, by ODE, as PNG files.

    Returns how many were sampled. An image's noise does not depend on ``batch``.

    Raises:
        Stopped: a stop was asked for; the images so far are kept.
    """
    missing = {prompt for prompt in prompts if not image_path(folder, prompt, index).exists()}
    grid = build_grid(config.grid, policy.image_tokens)
    with ProgressReport("sample", len(prompts), done=len(prompts) - len(missing)) as report:
        for start in range(0, len(prompts), batch):
            # Whole batches, whichever images are there: in others, sums would be rounded otherwise.
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
) -> pd.DataFrame:
    """Scores every prompt's image with every reward and writes ``output`` (Parquet).

    One row per image and reward, with :data:`benchmarks.evaluation.scoring.engine.COLUMNS`. A
    journal is kept beside ``output`` until all is done.

    Raises:
        UserError: an image is missing or damaged; it is named.
        Stopped: a stop was asked for; the scores so far are kept.
    """
    items = [
        Item(prompt.id, path, prompt.text, prompt.id, prompt.style, path.name)
        for prompt in prompts
        for path in [image_path(images, prompt)]
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
    """Deletes all ``images`` of the prompts after the first ``keep`` (none where it is null)."""
    if keep is None:
        return
    check_publication()
    for prompt in prompts[keep:]:
        for index in range(images):
            image_path(folder, prompt, index).unlink(missing_ok=True)
