"""``python -m benchmarks.speed.rewards``: images a second, ours against each package's own call.

Both sides have the same random weights, from the same files, in one process on one device. A
package is called as its documentation or model page says; scores are compared before a time is
believed.
"""

import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import open_clip
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from benchmarks.speed import reward_files as files
from benchmarks.speed.packages import hpsv2_package, image_reward_package
from g2rpo.config import nearest
from g2rpo.errors import UserError
from g2rpo.policy.folder import checked_device
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.hps import CHECKPOINTS
from g2rpo.rewards.image_reward import MED_CONFIG
from g2rpo.rewards.open_clip_reward import WEIGHTS_FILES
from g2rpo.rewards.pick_score import image_features, text_features
from g2rpo.rewards.registry import load_reward
from g2rpo.rewards.weights import load_tokenizer

TOLERANCE = 1e-4
"""Largest difference of two scores that agree."""
IMAGE_SIDE: dict[files.Size, int] = {"full": 512, "small": 64}
PIPED_WIDTH = 120
"""Columns used where the output is no terminal."""
PROMPT = "a large red circle on black, two blue stars above a green ring, picture {}"


@dataclass(frozen=True)
class Work:
    """What is scored: uint8 images [N, H, W, 3], those of a prompt next to each other."""

    size: files.Size
    images: Tensor
    prompts: list[str]
    groups: int
    device: torch.device

    def by_image(self, one: Callable[[Image.Image, str], float]) -> Callable[[], list[float]]:
        """Scoring of all images one by one, as the packages take them."""
        pictures = [Image.fromarray(image.numpy()) for image in self.images]
        pairs = list(zip(pictures, self.prompts, strict=True))
        return torch.no_grad()(lambda: [one(*pair) for pair in pairs])

    @property
    def per_group(self) -> int:
        """Images of one prompt."""
        return len(self.images) // self.groups


@dataclass(frozen=True)
class Rival:
    """A package's way to score all images; ``autocast``: in float16 on a GPU."""

    name: str
    score: Callable[[], list[float]]
    autocast: bool = False


# --- the packages --------------------------------------------------------------------------------


@contextmanager
def hps_rivals(folder: Path, work: Work) -> Iterator[list[Rival]]:
    """``hpsv2.score``, which reads its checkpoint at every call, and its model read once."""
    checkpoint = folder / CHECKPOINTS["v2.1"]
    with hpsv2_package(checkpoint, work.device, files.small_architecture(work.size)) as hpsv2:
        from hpsv2 import img_score  # can only be imported inside of this block

        tokenize = img_score.get_tokenizer(files.HPS_NAME)
        pictures = [Image.fromarray(image.numpy()) for image in work.images]

        def documented() -> list[float]:
            scores: list[float] = []
            for start in range(0, len(pictures), work.per_group):
                group = pictures[start : start + work.per_group]
                scores += map(float, hpsv2.score(group, work.prompts[start], hps_version="v2.1"))
            return scores

        def one(picture: Image.Image, prompt: str) -> float:
            # The body of its loop, on the model that the calls before have left.
            pixels = img_score.model_dict["preprocess_val"](picture)[None].to(work.device)
            with torch.cuda.amp.autocast():
                out = img_score.model_dict["model"](pixels, tokenize([prompt]).to(work.device))
                logits = out["image_features"] @ out["text_features"].T
            return float(logits[0, 0])

        yield [
            Rival("hpsv2.score", documented, autocast=True),
            Rival("hpsv2's model, by image", work.by_image(one), autocast=True),
        ]


@contextmanager
def clip_rivals(folder: Path, work: Work) -> Iterator[list[Rival]]:
    """The loop of the model's page: ``create_model_from_pretrained``, encode, normalise."""
    model, preprocess = open_clip.create_model_from_pretrained(
        files.CLIP_NAME,
        pretrained=str(folder / WEIGHTS_FILES[0]),
        image_resize_mode=files.CLIP_RESIZE,
        device=work.device,
    )
    model.eval()
    tokenize = open_clip.get_tokenizer(files.CLIP_NAME)

    def one(picture: Image.Image, prompt: str) -> float:
        of_image = model.encode_image(preprocess(picture)[None].to(work.device))
        of_text = model.encode_text(tokenize([prompt]).to(work.device))
        first, second = (nn.functional.normalize(f, dim=-1) for f in (of_image, of_text))
        return float((first @ second.T)[0, 0])

    yield [Rival("open_clip, by image", work.by_image(one))]


@contextmanager
def pick_score_rivals(folder: Path, work: Work) -> Iterator[list[Rival]]:
    """The loop of the model's page: processor and CLIPModel."""
    model = CLIPModel.from_pretrained(folder).eval().to(work.device)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def one(picture: Image.Image, prompt: str) -> float:
        pixels = processor(images=[picture], return_tensors="pt").pixel_values.to(work.device)
        text = tokenizer(
            prompt, padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(work.device)
        of_text = text_features(model, text.input_ids, text.attention_mask)
        return float(model.logit_scale.exp() * (of_text @ image_features(model, pixels).T)[0, 0])

    yield [Rival("transformers, by image", work.by_image(one))]


@contextmanager
def image_reward_rivals(folder: Path, work: Work) -> Iterator[list[Rival]]:
    """``ImageReward.load`` and ``model.score(prompt, image)``."""
    vision = None if work.size == "full" else files.image_reward_vision(work.size)
    with image_reward_package(load_tokenizer(folder), vision) as package:
        model = package.load(
            str(folder / "ImageReward.pt"),
            device=work.device,
            med_config=str(folder / MED_CONFIG),
        )
        yield [
            Rival(
                "ImageReward's score, by image",
                work.by_image(lambda picture, prompt: float(model.score(prompt, picture))),
            )
        ]


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


# --- the measurement -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of the table: seconds for all images, and the largest difference from our scores."""

    reward: str
    name: str
    seconds: float
    ours: float
    difference: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether the scores are ours."""
        return self.difference is None or self.difference <= TOLERANCE


def make_work(size: files.Size, images: int, groups: int, device: torch.device) -> Work:
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
    return Work(size, pixels, prompts, groups, device)


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
        lines = [Line(reward, "g2rpo", ours, ours)]
        # The packages print what they load.
        with redirect_stdout(sys.stderr), bench.rivals(folder, work) as rivals:
            for rival in rivals:
                seconds, found = _time_rival(rival, work)
                difference = (torch.tensor(found) - scores).abs().max().item()
                lines.append(Line(reward, rival.name, seconds, ours, difference))
    return lines


def _time_ours(reward: str, folder: Path, work: Work) -> tuple[float, Tensor]:
    config = RewardConfig(model=reward, source=str(folder), **BENCHES[reward].options)
    model = load_reward(config, work.device)
    model.score(work.images, work.prompts)
    started = time.perf_counter()
    scores = model.score(work.images, work.prompts)
    seconds = time.perf_counter() - started
    if float(scores.std()) < 10 * TOLERANCE:
        raise UserError(f"{reward}: the scores of random weights are constant; nothing is compared")
    return seconds, scores


def _time_rival(rival: Rival, work: Work) -> tuple[float, list[float]]:
    """Seconds for all images after a warm-up, and their scores."""
    # In float16 it is timed as it is, and compared in float32.
    in_half = rival.autocast and work.device.type == "cuda"
    with patch.object(torch.cuda.amp, "autocast", nullcontext) if in_half else nullcontext():
        scores = rival.score()
    started = time.perf_counter()
    rival.score()
    return time.perf_counter() - started, scores


def show(lines: Sequence[Line], work: Work, console: Console) -> None:
    """Prints the table and what it was measured on."""
    images = len(work.images)
    table = Table(title=f"Scoring {images} images of {work.groups} prompts")
    for heading in ("Reward", "Scored by"):
        table.add_column(heading, overflow="fold")
    for heading in ("Seconds", "Images/s", "g2rpo is faster by", "Largest difference"):
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(
            line.reward,
            line.name,
            f"{line.seconds:.3g}",
            f"{images / line.seconds:.3g}",
            f"{line.seconds / line.ours:.2f}×" if line.agrees else "–",
            "" if line.difference is None
            else f"{line.difference:.1e}{'' if line.agrees else ' DIFFERS'}",
        )  # fmt: skip
    console.print(table)
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
) -> None:
    """Times every reward model against its package. Full size takes up to 4 GB in TMPDIR."""
    try:
        _main(size, (images, prompts), rewards.split(","), device)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def _main(size: str, numbers: tuple[int, int], rewards: list[str], device: str | None) -> None:
    if size not in IMAGE_SIDE:
        raise UserError(f"--size {size}: {nearest(size, IMAGE_SIDE)}")
    for reward in rewards:
        if reward not in BENCHES:
            raise UserError(f"--rewards: unknown reward {reward!r}; {nearest(reward, BENCHES)}")
    chosen: files.Size = "full" if size == "full" else "small"
    where = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cudnn.allow_tf32 = False  # both sides compute the patches in float32
    work = make_work(chosen, *numbers, where)
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
