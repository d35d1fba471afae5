"""What is scored: image files with their prompts, from a manifest or from a folder.

A manifest is CSV or JSONL with the columns ``image`` (a path, from the manifest's folder) and
``prompt``, and optionally ``id``, ``prompt_id`` and ``style``. A folder's images find their prompts

- in a prompt set, by the name of the file: ``<prompt id>.png``, or ``<prompt id>_<anything>.png``
  for several images of one prompt;
- in the ``manifest.csv``, ``manifest.jsonl`` or ``metadata.jsonl`` (``file_name``, ``text``) in it;
- beside them, in ``<name>.txt``.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from g2rpo.data.images import SUFFIXES
from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError

MANIFESTS = ("manifest.csv", "manifest.jsonl", "metadata.jsonl")
_SAME = {"file_name": "image", "text": "prompt", "caption": "prompt"}
"""Other names of a manifest's columns, as image folders on the hub have them."""


@dataclass(frozen=True)
class Item:
    """One image and the prompt that it is scored against.

    Attributes:
        id: names the row; unique.
        image: the file.
        prompt: the prompt's text.
        prompt_id: shared by the images of one prompt.
        style: the prompt's style, where its set has styles.
    """

    id: str
    image: Path
    prompt: str
    prompt_id: str
    style: str | None = None


@dataclass
class Source:
    """Items to score, and what is wrong with others: pairs of a name and a reason."""

    items: list[Item] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)

    def add(self, item: Item) -> None:
        """Takes in ``item``, or what is wrong with it."""
        if not item.prompt.strip():
            self.bad.append((item.id, "its prompt is empty"))
        elif not item.image.is_file():
            self.bad.append((item.id, f"no such image: {item.image}"))
        else:
            self.items.append(item)


def read_source(path: Path, prompts: Sequence[Prompt] | None = None) -> Source:
    """The items of a folder or manifest ``path``; ``prompts`` names those of a folder.

    Raises:
        UserError: ``path`` is neither, a manifest cannot be read, or there is nothing to score.
    """
    if path.is_dir():
        source = _read_folder(path, prompts)
    elif not path.exists():
        raise UserError(f"{path}: no such folder of images or manifest")
    elif prompts is not None:
        raise UserError(f"{path}: a manifest has its own prompts; --prompts is for folders")
    else:
        source = _read_manifest(path)
    _refuse_duplicates(source)
    if not source.items and not source.bad:
        raise UserError(f"{path}: no images to score ({', '.join(sorted(SUFFIXES))})")
    return source


def _read_folder(folder: Path, prompts: Sequence[Prompt] | None) -> Source:
    if prompts is not None:
        return _match(folder, _images(folder), prompts)
    for name in MANIFESTS:
        if (folder / name).is_file():
            return _read_manifest(folder / name)
    source = Source()
    for image in _images(folder):
        name = image.relative_to(folder).with_suffix("").as_posix()
        caption = image.with_suffix(".txt")
        if caption.is_file():
            source.add(Item(name, image, caption.read_text(encoding="utf-8-sig").strip(), name))
        else:
            source.bad.append(
                (name, f"no prompt: give --prompts, or write {caption.name} or a manifest")
            )
    return source


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _match(folder: Path, images: Sequence[Path], prompts: Sequence[Prompt]) -> Source:
    source = Source()
    by_id = {prompt.id: prompt for prompt in prompts}
    found: set[str] = set()
    for image in images:
        name = image.relative_to(folder).with_suffix("").as_posix()
        prompt = _prompt_of(image.stem, by_id)
        if prompt is None:
            source.bad.append((name, "no prompt of the set has its name as id"))
            continue
        found.add(prompt.id)
        source.add(Item(name, image, prompt.text, prompt.id, prompt.style))
    source.bad += [
        (prompt.id, "the prompt has no image in the folder")
        for prompt in prompts
        if prompt.id not in found
    ]
    return source


def _prompt_of(stem: str, by_id: Mapping[str, Prompt]) -> Prompt | None:
    """The prompt whose id is ``stem``, or the longest part of it before an underscore."""
    while stem not in by_id:
        stem, mark, _ = stem.rpartition("_")
        if not mark:
            return None
    return by_id[stem]


def _read_manifest(path: Path) -> Source:
    source = Source()
    for number, row in _rows(path):
        record = {_SAME.get(key, key): value for key, value in row.items()}
        image, prompt = record.get("image"), record.get("prompt")
        if not image or prompt is None:
            missing = "prompt" if image else "image"
            raise UserError(f"{path}, line {number}: no {missing!r}; each row needs both")
        name = str(record.get("id") or Path(str(image)).with_suffix("").as_posix())
        style = record.get("style")
        source.add(
            Item(
                id=name,
                image=path.parent / str(image),
                prompt=str(prompt).strip(),
                prompt_id=str(record.get("prompt_id") or name),
                style=str(style) if style else None,
            )
        )
    return source


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV or JSONL file with their line numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if path.suffix == ".csv":
                reader = csv.DictReader(lines, strict=True)
                yield from ((reader.line_num, row) for row in reader)
            elif path.suffix == ".jsonl":
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise UserError(f"{path}, line {number}: not a JSON object")
                        yield number, row
            else:
                raise UserError(f"{path}: a manifest is a .csv or .jsonl file")
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a manifest ({error})") from None


def _refuse_duplicates(source: Source) -> None:
    """Which of several rows of one id is meant cannot be known: none of them is kept."""
    counts = Counter(item.id for item in source.items)
    source.bad += [(name, f"the id is there {n} times") for name, n in counts.items() if n > 1]
    source.items = [item for item in source.items if counts[item.id] == 1]


def refuse_bad(source: Source, skip: bool) -> None:
    """Raises :class:`UserError` with all that is wrong, unless it is to be skipped.

    Also where nothing is left to score.
    """
    if source.bad and not skip:
        shown = "; ".join(f"{name}: {reason}" for name, reason in source.bad[:5])
        more = f"; and {len(source.bad) - 5} more" if len(source.bad) > 5 else ""
        raise UserError(
            f"{len(source.bad)} cannot be scored: {shown}{more}; mend them, or leave them out "
            "with --skip-bad"
        )
    if not source.items:
        raise UserError("nothing is left to score: every image or prompt is bad")
