"""``python -m benchmarks.speed.rewards``: images a second of each reward model, beside its package.

Both score the same PNG files with the same random weights, in turn. The packages score as their
documentation shows, most of them one image at a time; we as ``g2rpo score`` does, where threads
read, resize and tokenize the next batches while the model runs.

The report keeps the rows of rewards that are not measured again.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import nn

from benchmarks.command import run
from benchmarks.evaluation.scoring.engine import Scorer
from benchmarks.evaluation.scoring.items import Item
from benchmarks.speed.report import markdown_table, write_report
from benchmarks.speed.reward_towers import TOWERS
from benchmarks.speed.reward_vlms import VLMS
from benchmarks.speed.scored import PROMPT
from g2rpo.config import nearest
from g2rpo.data.images import load_image
from g2rpo.errors import UserError
from g2rpo.files import read_json
from g2rpo.policy.folder import checked_device
from g2rpo.provenance import provenance
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.registry import load_reward
from g2rpo.seeds import gaussian

OUTPUT = Path("results/speed")
SIDE = 1024
IMAGES = {"cpu": 4, "cuda": 32}
SCORED = TOWERS | VLMS
DIVISORS = (1, 2, 4, 8, 16)
REDUCED = 8
MEMORY = 48 * 2**30
"""Bytes on a GPU for a vision-language model of the published size, twice in bfloat16."""
TOLERANCE = 1e-4
"""Largest difference between two scores of an image that counts as rounding."""


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


def default_divisor(name: str, device: torch.device) -> int:
    """1, the published size; :data:`REDUCED` where a vision-language model does not fit."""
    fits = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] >= MEMORY
    return REDUCED if SCORED[name].billions and not fits else 1


def measure(
    name: str, images: Sequence[Item], device: torch.device, repeats: int, divisor: int
) -> dict[str, Any]:
    """Images a second of the package and of ours: medians over ``repeats``, in turn."""
    scored = SCORED[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        with torch.random.fork_rng():
            torch.manual_seed(0)
            scored.write(folder, divisor)
        options = scored.options.get(device.type, {})
        if scored.questions is not None:
            options = options | {"question": {"questions": str(folder / scored.questions)}}
        ours = load_reward(RewardConfig(model=name, source=str(folder), **options), device)
        with scored.package(folder, device) as package:
            package(images[:1])  # warms up
            ours.score([load_image(images[0].image).pixels], [images[0].prompt])
            rows = []
            for number in range(repeats):
                started = time.perf_counter()
                expected = package(images)
                between = time.perf_counter()
                scorer = Scorer(Path(temporary) / f"journal-{number}", images)
                table = scorer.score(name, ours)
                found = table["score"][table["reward"] == name].to_numpy()
                done = time.perf_counter()
                rows.append((between - started, done - between, scorer.waiting[name]))
    theirs, mine, waiting = (statistics.median(column) for column in zip(*rows, strict=True))
    ratios = [one / two for one, two, _ in rows]
    networks = ours.networks()
    return {
        "reward": name, "package": len(images) / theirs, "ours": len(images) / mine,
        "ratio": statistics.median(ratios), "ratios": ratios, "waiting": waiting,
        "difference": float(abs(found - np.array(expected)).max()),
        "divisor": divisor, "dtype": str(next(networks[0].parameters()).dtype).split(".")[1],
        "parameters": sum(each.numel() for network in networks for each in network.parameters()),
        "images": len(images), "repeats": repeats, "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def _size(row: dict[str, Any]) -> str:
    published = row["divisor"] == 1
    size = "published" if published else f"**reduced**: 1/{row['divisor']} of width and layers"
    return f"{size}, {row['parameters'] / 1e6:,.0f} M, {row['dtype']}"


def _measured(row: dict[str, Any]) -> str:
    origin = row["provenance"]
    commit = (origin["git_commit"] or "unknown")[:7] + ("-dirty" if origin["git_dirty"] else "")
    return (
        f"{row['date']}, {commit}, {origin['hardware']['device']}, threads: {row['threads']}, "
        f"images: {row['images']}, repeats: {row['repeats']}, "
        f"load: {'unknown' if row['load'] is None else format(row['load'], '.0f')}"
    )


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        (
            row["reward"], SCORED[row["reward"]].beside, _size(row), f"{row['package']:.3g}",
            f"{row['ours']:.3g}",
            f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})",
            f"{row['waiting']:.0%}",
            f"{row['difference']:.1e}" + (" (!)" if row["difference"] > TOLERANCE else ""),
            _measured(row),
        )
        for row in result["rewards"]
    ]  # fmt: skip
    head = (
        "reward", "beside", "size", "package, images/s", "ours, images/s", "ratio", "model waits",
        "difference", "measured",
    )  # fmt: skip
    table = markdown_table(head, rows, "---:")
    return (
        f"# Images a second of each reward model\n\nPNG files of {SIDE}x{SIDE} pixels, random "
        "weights; medians. The packages score one image at a time where no number is given. "
        "*size*: parameters of the network that ran; the speed of a reduced one is not the "
        "published model's. *model waits*: the share of our time in which the model waits for "
        "images. *difference*: the largest between two scores of an image; (!) is more than "
        f"{TOLERANCE:g}. *load*: processes that ran before; with more than a few, images a second "
        f"are those of a busy machine, and only the ratio counts.\n\n{table}\n"
    )


def main(
    images: Annotated[int | None, typer.Option(help="Default: 4; 32 on a GPU.", min=2)] = None,
    rewards: Annotated[str, typer.Option(help="Reward models, e.g. hps,clip.")] = ",".join(SCORED),
    device: Annotated[
        str, typer.Option(help="cpu or cuda; default: cuda if there is one.")
    ] = "cuda" if torch.cuda.is_available() else "cpu",
    repeats: Annotated[int, typer.Option(min=1)] = 2,
    divide: Annotated[
        int | None,
        typer.Option(
            help="Divides the published width and layers: 1, 2, 4, 8 or 16. Default: 1, but 8 for "
            "vision-language models unless a GPU has 48 GiB free."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Output folder.")] = OUTPUT,
) -> None:
    """Time reward models beside their packages; other rewards' rows in the report stay."""
    place = checked_device(device)
    names = rewards.split(",")
    for name in names:
        if name not in SCORED:
            raise UserError(f"--rewards: no reward {name!r} here; {nearest(name, SCORED)}")
    if divide not in (None, *DIVISORS):
        raise UserError(f"--divide: {divide} is not one of {', '.join(map(str, DIVISORS))}")
    report = output / "rewards.json"
    rows = {row["reward"]: row for row in read_json(report)["rewards"]} if report.is_file() else {}
    origin = provenance({})  # before the minutes in which the code may change
    with tempfile.TemporaryDirectory() as folder:
        items = _write_images(Path(folder) / "images", images or IMAGES[place.type])
        # Before the first takes its memory.
        divisors = {name: divide or default_divisor(name, place) for name in names}
        for name, divisor in divisors.items():
            load = os.getloadavg()[0]
            measured = measure(name, items, place, repeats, divisor)
            rows[name] = measured | {"provenance": origin, "load": load}
            result = {"rewards": [rows[each] for each in SCORED if each in rows]}
            write_report(output, "rewards", result, page(result))


if __name__ == "__main__":
    run(main)
