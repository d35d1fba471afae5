"""Images of the current policy on fixed prompts during training: scored, or kept as previews.

Both use fixed noise, so that they show the training's progress, which they do not affect. Previews
use the evaluation's protocol (prompts, noise, grid, size, guidance), so they can be compared with
the held-out images of the base and of the trained policy. Existing ones are not sampled again.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from g2rpo.batching import BatchSize
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.files import atomic_path
from g2rpo.flow.schedule import build_grid
from g2rpo.sampling import sample_ode
from g2rpo.training.checkpoint.folder import iterations_in, writing
from g2rpo.training.collective import of_all_ranks, raise_on_all_ranks
from g2rpo.training.config import PicturesConfig, TrainConfig, ValidationConfig
from g2rpo.training.rollout import RolloutEngine
from g2rpo.training.weights import TrainedWeights

PIXELS_AT_ONCE = 2**21
"""Pixels sampled together: two images of 1024x1024, beside the weights and optimiser states."""


def shared_prompts(prompts: list[Prompt], rank: int, ranks: int) -> tuple[list[Prompt], int]:
    """A rank's prompts, and how many of them count.

    All ranks get the same number, so that they make the same forwards: a rank with fewer prompts
    repeats the last one.
    """
    mine = prompts[rank::ranks]
    number = -(-len(prompts) // ranks)
    return mine + [prompts[-1]] * (number - len(mine)), len(mine)


def validation_rewards(
    config: ValidationConfig, engine: RolloutEngine, weights: TrainedWeights, micro_batch: BatchSize
) -> dict[str, float]:
    """The mean of each reward over the prompts, on every rank; images are sampled by ODE.

    Raises:
        UserError: on all ranks, if a reward fails on any of them.
    """
    accelerator = weights.accelerator
    prompts = read_prompts(Path(config.file), config.limit)
    ranks = accelerator.num_processes
    mine, counted = shared_prompts(prompts, accelerator.process_index, ranks)
    with weights.rollout():
        images = sample_ode(engine.policy, mine, engine.grid, config.seed, micro_batch)
    texts = [prompt.text for prompt in mine[:counted]]
    scores: dict[str, list[float]] = {name: [] for name in engine.rewards}
    with raise_on_all_ranks(accelerator):
        if counted:
            for name, model in engine.rewards.items():
                scores[name] = model.score(images[:counted], texts).double().tolist()
    every = of_all_ranks(accelerator, scores)
    return {
        f"validation/{name}": float(
            torch.tensor([v for own in every for v in own[name]], dtype=torch.float64).mean()
        )
        for name in scores
    }


def pictures_folder(run: Path, iteration: int) -> Path:
    """The folder of the previews after ``iteration`` iterations, ``<prompt id>.png``."""
    return run / "images" / f"iteration-{iteration:06d}"


def pictured_iterations(run: Path) -> list[int]:
    """The iterations that have previews, ascending."""
    return iterations_in(run / "images")


def save_previews(config: TrainConfig, run: Path, weights: TrainedWeights, done: int) -> None:
    """Samples and writes the previews that are due and missing. All ranks call it together.

    Called at the start of the next iteration, so that a run stopped in between still gets them when
    it resumes, with ``done`` iterations.

    Raises:
        UserError: on all ranks, if an image cannot be written or the prompts cannot be read.
    """
    wanted = config.pictures
    if wanted is None or done not in wanted.iterations(config.optimization.iterations):
        return
    accelerator = weights.accelerator
    prompts = read_prompts(Path(wanted.file), wanted.limit)
    mine, counted = shared_prompts(prompts, accelerator.process_index, accelerator.num_processes)
    paths = [pictures_folder(run, done) / f"{prompt.id}.png" for prompt in mine[:counted]]
    if not any(of_all_ranks(accelerator, not all(path.exists() for path in paths))):
        return
    images = _sampled(wanted, weights, mine)
    with raise_on_all_ranks(accelerator), writing(run, f"images of iteration {done}"):
        for path, pixels in zip(paths, images, strict=False):
            with atomic_path(path) as temporary:
                Image.fromarray(pixels.numpy()).save(temporary, format="PNG")


def _sampled(config: PicturesConfig, weights: TrainedWeights, prompts: list[Prompt]) -> Tensor:
    """Images of the current weights at the protocol's size, uint8 [P, H, W, 3] on the CPU."""
    policy = weights.policy.at(config)
    grid = build_grid(config.grid, policy.image_tokens)
    batch = max(1, min(len(prompts), PIXELS_AT_ONCE // config.pixels))
    with weights.rollout():
        return sample_ode(policy, prompts, grid, config.seed, batch)
