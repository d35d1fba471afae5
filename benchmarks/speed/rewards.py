"""``python -m benchmarks.speed.rewards``: images a second, ours against each package's own call.

Both sides have the same random weights, from the same files, in one process on one device. A
package is called as its documentation says; scores are compared before a time is believed.
"""

import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.speed import reward_files as files
from benchmarks.speed.reward_rivals import (
    Rival,
    Work,
    clip_rivals,
    hps_rivals,
    image_reward_rivals,
    pick_score_rivals,
)
from g2rpo.config import nearest
from g2rpo.errors import UserError
from g2rpo.policy.folder import checked_device
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.registry import load_reward

TOLERANCE = 1e-4
"""Largest difference of two scores that agree."""
IMAGE_SIDE: dict[files.Size, int] = {"full": 512, "small": 64}
PIPED_WIDTH = 120
"""Columns used where the output is no terminal."""
PROMPT = "a large red circle on black, two blue stars above a green ring, picture {}"


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        reward: registry name.
        name: who scored.
        seconds: for all images; extrapolated where ``timed`` is below ``calls``.
        images: N.
        timed: calls that were timed.
        calls: calls that all images take.
        difference: largest difference from our scores; None for ours.
        baseline: our seconds.
    """

    reward: str
    name: str
    seconds: float
    images: int
    timed: int
    calls: int
    difference: float | None
    baseline: float

    @property
    def agrees(self) -> bool:
        """Whether the scores are ours."""
        return self.difference is None or self.difference <= TOLERANCE


def make_work(
    size: files.Size, images: int, groups: int, device: torch.device, sample: int | None
) -> Work:
    """Images of smooth random colours with noise, so that no two score alike.

    Raises:
        UserError: the images cannot be shared equally among the prompts.
    """
    if images % groups:
        raise UserError(f"--images {images} is no multiple of --prompts {groups}; change one")
    draws = torch.Generator().manual_seed(0)
    side = IMAGE_SIDE[size]
    coarse = torch.randint(0, 256, (images, 3, 5, 5), generator=draws).float()
    smooth = nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noisy = smooth + 20 * torch.randn(smooth.shape, generator=draws)
    pixels = noisy.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    prompts = [PROMPT.format(index * groups // images) for index in range(images)]
    return Work(size, pixels, prompts, groups, device, sample)


@dataclass(frozen=True)
class Bench:
    """How one reward is built and who scores against it."""

    write: Callable[[Path, files.Size], None]
    rivals: Callable[[Path, Work], AbstractContextManager[list[Rival]]]
    options: dict[str, Any] = field(default_factory=dict)
    """Of our reward's configuration, where its default is not what the package gives."""


BENCHES: dict[str, Bench] = {
    "hps": Bench(lambda folder, _: files.write_hps(folder), hps_rivals),
    "clip": Bench(lambda folder, _: files.write_clip(folder), clip_rivals),
    "pick_score": Bench(files.write_pick_score, pick_score_rivals, {"variant": "logit"}),
    "image_reward": Bench(files.write_image_reward, image_reward_rivals),
}


def run(reward: str, work: Work) -> list[Line]:
    """Times one reward: a line for ours and one for each way of its package.

    The models are in memory one after the other.
    """
    bench = BENCHES[reward]
    with tempfile.TemporaryDirectory() as name, files.open_clip_architectures(work.size):
        folder = Path(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            bench.write(folder, work.size)
        gc.collect()
        ours, scores = _time_ours(reward, folder, work)
        gc.collect()
        images = len(work.images)
        lines = [Line(reward, "g2rpo", ours, images, 1, 1, None, ours)]
        # The packages print what they load.
        with redirect_stdout(sys.stderr), bench.rivals(folder, work) as rivals:
            for rival in rivals:
                seconds, found = _time_rival(rival, work)
                difference = (torch.tensor(found) - scores[: len(found)]).abs().max().item()
                calls = len(rival.calls)
                timed = calls if work.sample is None else min(work.sample, calls)
                lines.append(
                    Line(reward, rival.name, seconds, images, timed, calls, difference, ours)
                )
    return lines


def _time_ours(reward: str, folder: Path, work: Work) -> tuple[float, Tensor]:
    config = RewardConfig(model=reward, source=str(folder), **BENCHES[reward].options)
    model = load_reward(config, work.device)
    warm = len(work.images) if work.device.type == "cuda" else work.per_group
    model.score(work.images[:warm], work.prompts[:warm])
    started = time.perf_counter()
    scores = model.score(work.images, work.prompts)
    seconds = time.perf_counter() - started
    if float(scores.std()) < 10 * TOLERANCE:
        raise UserError(f"{reward}: the scores of random weights are constant; nothing is compared")
    return seconds, scores


def _time_rival(rival: Rival, work: Work) -> tuple[float, list[float]]:
    """Seconds for all images, and the scores of the images in the timed calls."""
    timed = rival.calls[: work.sample]
    rival.calls[0]()
    in_half = rival.autocast and work.device.type == "cuda"
    checked: list[float] = []
    if in_half:  # compared in float32, timed as it is
        with patch.object(torch.cuda.amp, "autocast", nullcontext):
            checked = [score for call in timed for score in call()]
    started = time.perf_counter()
    scores = [score for call in timed for score in call()]
    seconds = (time.perf_counter() - started) * len(rival.calls) / len(timed)
    return seconds, checked if in_half else scores


def show(lines: Sequence[Line], work: Work, console: Console) -> None:
    """Prints the table and what it was measured on."""
    table = Table(title=f"Scoring {len(work.images)} images of {work.groups} prompts")
    for heading in ("Reward", "Scored by"):
        table.add_column(heading, overflow="fold")
    for heading in ("Seconds", "Images/s", "g2rpo is faster by", "Largest difference"):
        table.add_column(heading, justify="right")
    for line in lines:
        about = "~" if line.timed < line.calls else ""
        verdict = "" if line.agrees else " DIFFERS"
        table.add_row(
            line.reward,
            line.name,
            f"{about}{line.seconds:.3g}",
            f"{about}{line.images / line.seconds:.3g}",
            f"{about}{line.seconds / line.baseline:.2f}×" if line.agrees else "–",
            "" if line.difference is None else f"{line.difference:.1e}{verdict}",
        )
    console.print(table)
    for line in lines:
        if line.timed < line.calls:
            console.print(
                f"~ {line.reward}, {line.name}: {line.timed} of {line.calls} calls timed, "
                "the rest extrapolated",
                highlight=False,
            )
    gpu = work.device.type == "cuda"
    device = torch.cuda.get_device_name(work.device) if gpu else "cpu"
    half = "; hpsv2 in float16 autocast, as it comes" if gpu else ""
    side = work.images.shape[1]
    console.print(
        f"{work.size} models with random weights, {side}x{side} images, {device}, "
        f"{torch.get_num_threads()} threads, float32{half}, torch {torch.__version__}, one run "
        "after a warm-up; files are read from a temporary folder",
        highlight=False,
    )


def main(
    size: Annotated[str, typer.Option(help="full: the published architectures; small: toys.")] = (
        "full"
    ),
    images: Annotated[int, typer.Option(min=1, help="Images, a multiple of the prompts.")] = 32,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts.")] = 4,
    rewards: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(BENCHES),
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Times so many calls of a package, not all.")
    ] = None,
) -> None:
    """Times every reward model against its package. Full size takes up to 4 GB in TMPDIR."""
    try:
        _main(size, (images, prompts, sample), rewards.split(","), device)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def _main(
    size: str, numbers: tuple[int, int, int | None], rewards: list[str], device: str | None
) -> None:
    if size not in IMAGE_SIDE:
        raise UserError(f"--size {size}: {nearest(size, IMAGE_SIDE)}")
    for reward in rewards:
        if reward not in BENCHES:
            raise UserError(f"--rewards: unknown reward {reward!r}; {nearest(reward, BENCHES)}")
    chosen: files.Size = "full" if size == "full" else "small"
    where = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cudnn.allow_tf32 = False  # both sides compute the patches in float32
    work = make_work(chosen, numbers[0], numbers[1], where, numbers[2])
    lines = [line for reward in rewards for line in run(reward, work)]
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, PIPED_WIDTH)
    show(lines, work, console)
    wrong = [f"{line.reward} by {line.name}" for line in lines if not line.agrees]
    if wrong:
        raise UserError(f"scores differ by more than {TOLERANCE}: {', '.join(wrong)}; see above")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore", FutureWarning)  # what the packages call is on its way out
    typer.run(main)
