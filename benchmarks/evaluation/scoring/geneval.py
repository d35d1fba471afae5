"""Lays images out as the evaluator of GenEval reads them (arXiv 2310.11513).

The N-th prompt of the set has the folder N with ``metadata.jsonl``, its line of the published set,
and its images as ``samples/0000.png``, ... The evaluator silently skips other names. A
``manifest.jsonl`` says which image is which, so that the laid out folder can itself be scored.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.evaluation.scoring.items import Item, Source
from g2rpo.data.images import load_image
from g2rpo.data.tables import read_table
from g2rpo.errors import UserError
from g2rpo.files import atomic_folder, atomic_write_text

METADATA = ("tag", "include", "exclude", "prompt")
"""The keys of a line of the published set; only ``exclude`` may be absent."""
MODES = ("1", "L", "P", "RGB")
"""Pillow's modes of images in which evaluator and rewards see the same."""


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """The published lines of GenEval's set, as ``g2rpo prompts fetch geneval`` writes it.

    Raises:
        UserError: ``path`` does not exist or is another set.
    """
    advice = "run `g2rpo prompts fetch geneval` and pass --prompts data/prompts/geneval.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file; {advice}")
    lines = []
    for row in read_table(path, ("prompt",), bare="prompt").rows:
        line = {key: row.values[key] for key in METADATA if key in row.values}
        if not isinstance(line.get("tag"), str) or not isinstance(line.get("include"), list):
            raise UserError(
                f"{path}, {row.place}: not a prompt of GenEval, without tag and include; {advice}"
            )
        lines.append(line)
    if not lines:
        raise UserError(f"{path}: no prompts of GenEval; {advice}")
    return lines


def without_misread(source: Source) -> Source:
    """Refuses the images that the evaluator would skip, or read differently than the rewards do."""
    items, source.items = source.items, []
    for item in items:
        problem = _problem(item.image)
        if problem is None:
            source.items.append(item)
        else:
            source.refuse(item.id, problem)
    return source


def _problem(path: Path) -> str | None:
    try:
        load_image(path)
    except UserError as error:
        return str(error)
    with Image.open(path) as image:
        if image.format != "PNG":
            return f"a {image.format} file, which the evaluator skips; convert it to PNG"
        if image.mode not in MODES or "transparency" in image.info:
            return f"{image.mode} with transparency or 16 bits, which the evaluator drops"
        with suppress(Exception):  # damaged, and then ignored
            image.getexif()
        if image.getexif().get(0x0112, 1) != 1:
            return "turned by its EXIF orientation, which parts of the evaluator ignore"
    return None


def export(
    items: Sequence[Item], metadata: Mapping[str, tuple[int, dict[str, Any]]], output: Path
) -> None:
    """Writes ``items`` to the new folder ``output``; ``metadata``: number and line by prompt id.

    Images are linked, or copied where that is not possible, and not altered.
    """
    samples: dict[str, list[Item]] = defaultdict(list)
    stems = {item.id: Path(item.name).stem for item in items}
    for item in sorted(
        items, key=lambda item: (len(stems[item.id]), stems[item.id])
    ):  # 2 before 10
        samples[item.prompt_id].append(item)
    rows = []
    with atomic_folder(output) as folder:
        for prompt_id, (number, line) in metadata.items():
            if prompt_id not in samples:
                continue
            place = folder / f"{number:05d}"
            (place / "samples").mkdir(parents=True)
            atomic_write_text(place / "metadata.jsonl", json.dumps(line) + "\n")
            for index, item in enumerate(samples[prompt_id]):
                image = place / "samples" / f"{index:04d}.png"
                _link(item.image, image)
                rows.append(
                    {
                        "image": image.relative_to(folder).as_posix(),
                        "prompt": item.prompt,
                        "id": item.id,
                        "prompt_id": item.prompt_id,
                        "style": item.style,
                    }
                )
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write_text(folder / "manifest.jsonl", text)


def _link(source: Path, target: Path) -> None:
    with suppress(OSError):  # another file system, or one without links
        if os.access(source, os.W_OK):  # else it could not be synced to disk
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)
