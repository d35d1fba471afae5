"""Preview images of a few fixed prompts during training.

They use the evaluation's protocol (prompts, noise, grid, size, guidance), so they can be
compared with the held-out images of the base and of the trained policy. Training is unaffected, and
existing images are not sampled again.
"""

from pathlib import Path

from PIL import Image
from torch import Tensor

from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.files import atomic_path
from g2rpo.flow.schedule import build_grid
from g2rpo.sampling import sample_ode
from g2rpo.training.checkpoint.folder import iterations_in, writing
from g2rpo.training.collective import of_all_ranks, raise_on_all_ranks
from g2rpo.training.config import PicturesConfig, TrainConfig
from g2rpo.training.validation import shared_prompts
from g2rpo.training.weights import TrainedWeights

PIXELS_AT_ONCE = 2**21
"""Pixels sampled together: two images of 1024x1024, beside the weights and optimiser states."""


def pictures_folder(run: Path, iteration: int) -> Path:
    """The folder of the previews after ``iteration`` iterations, ``<prompt id>.png``."""
    return run / "images" / f"iteration-{iteration:06d}"


def pictured_iterations(run: Path) -> list[int]:
    """The iterations that have previews, ascending."""
    return iterations_in(run / "images")


def save_previews(config: TrainConfig, run: Path, weights: TrainedWeights, done: int) -> None:
    """Samples and writes the previews that are due and missing. All ranks call it together.

    Called at the start of the next iteration, so that a run stopped in between still gets them when
    it resumes.

    Args:
        config: the run's configuration.
        run: the run folder.
        weights: the current policy; the ranks share the prompts.
        done: iterations done.

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
