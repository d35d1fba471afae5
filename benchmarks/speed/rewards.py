"""``python -m benchmarks.speed.rewards``: images a second of each reward model, beside its package.

Both score the same PNG files with the same random weights, in turn. The packages score one image at
a time, as their documentation shows; we as ``g2rpo score`` does, where threads read, resize and
tokenize the next batches while the model runs.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import open_clip
import safetensors.torch
import torch
import typer
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from benchmarks.command import run
from benchmarks.evaluation.scoring.engine import Scorer
from benchmarks.evaluation.scoring.items import Item
from benchmarks.mini_world.small_rewards import (
    SmallImageReward,
    liven,
    save_open_clip,
    save_transformers_clip,
    word_tokenizer,
)
from benchmarks.mini_world.tokenizers import words
from benchmarks.reward_packages import hpsv2_open_clip, image_reward_package
from benchmarks.speed.report import markdown_table, write_report
from g2rpo.config import nearest
from g2rpo.data.images import load_image
from g2rpo.errors import UserError
from g2rpo.files import read_json, write_json
from g2rpo.policy.folder import checked_device
from g2rpo.provenance import provenance
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.image_reward import (
    MED_CONFIG,
    PUBLISHED_VISION,
    VISION_CONFIG,
    ImageRewardNetwork,
    add_blip_tokens,
)
from g2rpo.rewards.open_clip_reward import CONFIG_FILE, WEIGHTS_FILES, build_clip
from g2rpo.rewards.registry import load_reward
from g2rpo.seeds import gaussian

OUTPUT = Path("results/speed")
SIDE = 1024
PROMPT = "two small red circles above a blue star on gray, {}"
VIT_H = "ViT-H-14"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_VISION = {"patch_size": 56}
"""In place of the published sizes, to try the benchmark out."""

PackageScore = Callable[[Path, str], float]


@dataclass(frozen=True)
class Scored:
    """A reward model with random weights, and its package.

    Attributes:
        write: saves the weights, at the published size or a tiny one, to a folder.
        package: loads them from the folder to a device in the package's own way.
    """

    write: Callable[[Path, bool], None]
    package: Callable[[Path, torch.device], AbstractContextManager[PackageScore]]


def _clip_config(tiny: bool) -> dict[str, Any]:
    config: dict[str, Any] = open_clip.get_model_config(VIT_H)
    if tiny:
        config["embed_dim"] = 32
        config["vision_cfg"] |= {"patch_size": 56, "width": 32, "layers": 2, "head_width": 8}
        config["text_cfg"] |= {"width": 32, "heads": 4, "layers": 2}
    return config


def _write_open_clip(mode: str) -> Callable[[Path, bool], None]:
    def write(folder: Path, tiny: bool) -> None:
        config = _clip_config(tiny)
        clip = build_clip(config)
        liven(clip)
        save_open_clip(clip, config, mode, folder)

    return write


def _cosine(
    model: Any, transform: Callable[[Image.Image], torch.Tensor], device: torch.device
) -> PackageScore:
    """The score of one image at a time by two CLIP towers, as both packages' READMEs show it."""
    tokenize = open_clip.get_tokenizer(VIT_H)
    model.eval().to(device)

    def score(path: Path, prompt: str) -> float:
        with torch.no_grad():
            pixels = transform(Image.open(path)).unsqueeze(0).to(device)
            image = model.encode_image(pixels, normalize=True)
            text = model.encode_text(tokenize([prompt]).to(device), normalize=True)
            return float((image @ text.T).item())

    return score


def _load(model: nn.Module, folder: Path) -> nn.Module:
    model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILES[0]), strict=False)
    return model


@contextmanager
def _hpsv2(folder: Path, device: torch.device) -> Iterator[PackageScore]:
    with hpsv2_open_clip() as package:
        model = _load(package.CLIP(**read_json(folder / CONFIG_FILE)["model_cfg"]), folder)
        transform = package.image_transform(224, is_train=False, resize_longest_max=True)
        yield _cosine(model, transform, device)


@contextmanager
def _clip(folder: Path, device: torch.device) -> Iterator[PackageScore]:
    model = _load(build_clip(read_json(folder / CONFIG_FILE)["model_cfg"]), folder)
    transform = open_clip.image_transform(224, is_train=False, resize_mode="squash")
    yield _cosine(model, transform, device)


def _vocabulary(size: int) -> list[str]:
    """The words of the prompts, and others up to ``size``."""
    return [*words(), *(f"word{number}" for number in range(size - len(words())))]


def _write_pick_score(folder: Path, tiny: bool) -> None:
    tokenizer = word_tokenizer(_vocabulary(49408 - 5))
    vision = {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
    }  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 77,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "hidden_act": "gelu",
    }  # fmt: skip
    if tiny:
        vision, text = vision | TINY_VISION | TINY, text | TINY
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=text["hidden_size"])
    clip = CLIPModel(config)
    liven(clip)
    save_transformers_clip(clip, tokenizer, folder)


@contextmanager
def _pick_score(folder: Path, device: torch.device) -> Iterator[PackageScore]:
    model = CLIPModel.from_pretrained(folder).eval().to(device)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(path: Path, prompt: str) -> float:  # as the model card does
        pixels = processor(images=[Image.open(path)], return_tensors="pt").to(device)
        tokens = tokenizer(
            [prompt], padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.no_grad():
            image = model.get_image_features(**pixels).pooler_output
            text = model.get_text_features(
                input_ids=tokens.input_ids.to(device),
                attention_mask=tokens.attention_mask.to(device),
            ).pooler_output
            return float(torch.cosine_similarity(image, text).item())

    yield score


def _write_image_reward(folder: Path, tiny: bool) -> None:
    small = SmallImageReward(_vocabulary(30524 - 8))
    small.vision_config = PUBLISHED_VISION | (TINY_VISION | TINY if tiny else {})
    if not tiny:
        small.text_config |= {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 512,
        }  # fmt: skip
    small.network = ImageRewardNetwork(small.vision_config, small.text_config)
    liven(small.network)
    small.save(folder)


@contextmanager
def _image_reward(folder: Path, device: torch.device) -> Iterator[PackageScore]:
    vision, text = read_json(folder / VISION_CONFIG), read_json(folder / MED_CONFIG)
    settings = folder / "package_med_config.json"
    write_json(settings, text | {"add_cross_attention": True, "hidden_act": "gelu", "fusion": ""})
    tokenizer = add_blip_tokens(AutoTokenizer.from_pretrained(folder))
    with image_reward_package(tokenizer, vision) as package:
        model = package.ImageReward(med_config=str(settings), device=str(device))
        model.mlp = type(model.mlp)(text["hidden_size"])
        weights = safetensors.torch.load_file(folder / "image_reward.safetensors")
        model.load_state_dict(weights, strict=False)
        model.eval().to(device)

        def score(path: Path, prompt: str) -> float:
            with torch.no_grad():
                return float(model.score(prompt, str(path)))

        yield score


SCORED = {
    "hps": Scored(_write_open_clip("longest_padded"), _hpsv2),
    "clip": Scored(_write_open_clip("squash"), _clip),
    "pick_score": Scored(_write_pick_score, _pick_score),
    "image_reward": Scored(_write_image_reward, _image_reward),
}


def _write_images(folder: Path, count: int) -> list[Item]:
    """Smooth random images with some grain, as PNG files of :data:`SIDE` pixels."""
    folder.mkdir()
    items = []
    for number in range(count):
        coarse = 128 + 60 * gaussian((1, 3, 8, 8), number, "bench rewards")
        smooth = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic")[0]
        pixels = smooth + 4 * gaussian((3, SIDE, SIDE), number, "bench rewards grain")
        path = folder / f"{number:06d}.png"
        Image.fromarray(pixels.clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(path)
        items.append(Item(path.stem, path, PROMPT.format(number % 4), path.stem, None, path.name))
    return items


def measure(
    name: str, images: Sequence[Item], device: torch.device, repeats: int, *, tiny: bool
) -> dict[str, Any]:
    """Images a second of the package and of ours: medians over ``repeats``, in turn."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        with torch.random.fork_rng():
            torch.manual_seed(0)
            SCORED[name].write(folder, tiny)
        ours = load_reward(RewardConfig(model=name, source=str(folder)), device)
        with SCORED[name].package(folder, device) as package:
            package(images[0].image, images[0].prompt)  # warms up
            ours.score([load_image(images[0].image).pixels], [images[0].prompt])
            rows = []
            for number in range(repeats):
                started = time.perf_counter()
                expected = [package(item.image, item.prompt) for item in images]
                between = time.perf_counter()
                scorer = Scorer(Path(temporary) / f"journal-{number}", images)
                found = scorer.score(name, ours)["score"].to_numpy()
                done = time.perf_counter()
                rows.append((between - started, done - between, scorer.waiting[name]))
    theirs, mine, waiting = (statistics.median(column) for column in zip(*rows, strict=True))
    ratios = [one / two for one, two, _ in rows]
    return {
        "reward": name, "package": len(images) / theirs, "ours": len(images) / mine,
        "ratio": statistics.median(ratios), "ratios": ratios, "waiting": waiting,
        "difference": float(abs(found - np.array(expected)).max()),
    }  # fmt: skip


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        (
            row["reward"], f"{row['package']:.3g}", f"{row['ours']:.3g}",
            f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})",
            f"{row['waiting']:.0%}", f"{row['difference']:.1e}",
        )
        for row in result["rewards"]
    ]  # fmt: skip
    head = ("reward", "package, images/s", "ours, images/s", "ratio", "model waits", "difference")
    size = "tiny" if result["tiny"] else "published"
    return (
        f"# Images a second of each reward model\n\n{result['images']} PNG files of {SIDE}x{SIDE} "
        f"pixels, random weights of the {size} size, {result['device']}, {result['threads']} "
        f"threads, median of {result['repeats']}. The packages score one image at a time. *model "
        "waits*: the share of our time in which the model waits for images. *difference*: the "
        f"largest between two scores of an image.\n\n{markdown_table(head, rows, '---:')}\n"
    )


def main(
    images: Annotated[int, typer.Option(help="Number of images.", min=2)] = 16,
    rewards: Annotated[str, typer.Option(help="Reward models, e.g. hps,clip.")] = ",".join(SCORED),
    device: Annotated[
        str, typer.Option(help="cpu or cuda; default: cuda if there is one.")
    ] = "cuda" if torch.cuda.is_available() else "cpu",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    tiny: Annotated[bool, typer.Option(help="Tiny models, to try it out.")] = False,
    output: Annotated[Path, typer.Option(help="Output folder.")] = OUTPUT,
) -> None:
    """Time reward models of the published size beside their packages."""
    place = checked_device(device)
    names = rewards.split(",")
    for name in names:
        if name not in SCORED:
            raise UserError(f"--rewards: no reward {name!r} here; {nearest(name, SCORED)}")
    with tempfile.TemporaryDirectory() as folder:
        items = _write_images(Path(folder) / "images", images)
        rows = [measure(name, items, place, repeats, tiny=tiny) for name in names]
    result = {
        "provenance": provenance({}), "rewards": rows, "images": images, "repeats": repeats,
        "tiny": tiny, "device": place.type, "threads": torch.get_num_threads(),
    }  # fmt: skip
    write_report(output, "rewards", result, page(result))


if __name__ == "__main__":
    run(main)
