"""What is scored: image files with their prompts, from a manifest or from a folder.

A manifest is CSV or JSONL with the columns ``image`` (a path, from the manifest's folder) and
``prompt``, and optionally ``id``, ``prompt_id`` and ``style``; others are not read. Rows without a
``prompt_id`` belong together where their prompts are equal. A folder's images find their prompts

- in a prompt set, by the name of the file: ``<prompt id>.png``, or ``<prompt id>_<anything>.png``
  for several images of one prompt;
- in the ``manifest.csv``, ``manifest.jsonl`` or ``metadata.jsonl`` (``file_name``, ``text``) in it;
- beside them, in ``<name>.txt``.
"""

import csv
import hashlib
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
UNSUPPORTED = frozenset({".heic", ".heif", ".jxl"})
"""Names of images that Pillow does not read."""
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
        name: what the image is called in results: its path inside of the source.
    """

    id: str
    image: Path
    prompt: str
    prompt_id: str
    style: str | None = None
    name: str = ""


@dataclass
class Source:
    """Items to score, and what is wrong with others: pairs of a name and a reason."""

    items: list[Item] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)

    def add(self, item: Item) -> None:
        """Takes in ``item``, or what is wrong with it."""
        if not item.prompt.strip():
            self.bad.append((item.id, "its prompt is empty"))
        elif not (_is_text(item.prompt) and _is_text(item.id) and _is_text(str(item.image))):
            self.bad.append((ascii(item.id), "its name or prompt is not valid Unicode"))
        elif not item.image.is_file():
            self.bad.append((item.id, f"no such image: {item.image}"))
        else:
            self.items.append(item)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_source(
    path: Path, prompts: Sequence[Prompt] | None = None, *, every_prompt: bool = True
) -> Source:
    """The items of a folder or manifest ``path``.

    Args:
        path: the folder or manifest.
        prompts: names the images of a folder.
        every_prompt: whether one of ``prompts`` without an image is bad.

    Raises:
        UserError: ``path`` is neither, a manifest cannot be read, or there is nothing to score.
    """
    if path.is_dir():
        source = _read_folder(path, prompts, every_prompt=every_prompt)
    elif not path.exists():
        raise UserError(f"{path}: no such folder of images or manifest")
    elif prompts is not None:
        raise UserError(f"{path}: a manifest has its own prompts; --prompts is for folders")
    else:
        source = _read_manifest(path)
    if not source.items and not source.bad:
        raise UserError(f"{path}: no images to score ({', '.join(sorted(SUFFIXES))})")
    return source


def _read_folder(folder: Path, prompts: Sequence[Prompt] | None, *, every_prompt: bool) -> Source:
    images = _images(folder)
    if prompts is not None:
        source = _match(folder, images, prompts, every_prompt=every_prompt)
    else:
        manifests = [folder / name for name in MANIFESTS if (folder / name).is_file()]
        source = _read_manifest(manifests[0]) if manifests else _captioned(folder, images)
        listed = {item.image.resolve() for item in source.items} if manifests else None
        source.bad += [
            (_name(image, folder), f"no prompt: {manifests[0].name} does not list it")
            for image in images
            if listed is not None and image.resolve() not in listed
        ]
    source.bad += [
        (path.relative_to(folder).as_posix(), "Pillow does not read such images; convert it")
        for path in _visible(folder)
        if path.suffix.lower() in UNSUPPORTED
    ]
    return _without_duplicates(source)


def _visible(folder: Path) -> list[Path]:
    """All files, without those in hidden folders and in what archives of macOS add."""
    return sorted(
        path
        for path in folder.rglob("*")
        if not any(
            part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts
        )
    )


def _images(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.suffix.lower() in SUFFIXES]


def _name(image: Path, folder: Path) -> str:
    return image.relative_to(folder).with_suffix("").as_posix()


def _same_prompt(prompt: str) -> str:
    """The id of a prompt that has none: equal prompts are one."""
    return hashlib.sha256(prompt.encode(errors="replace")).hexdigest()[:12]


def _captioned(folder: Path, images: Sequence[Path]) -> Source:
    source = Source()
    for image in images:
        name, caption = _name(image, folder), image.with_suffix(".txt")
        shown = image.relative_to(folder).as_posix()
        try:
            text = caption.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            reason = f"no prompt: give --prompts, or write {caption.name} or a manifest"
            source.bad.append((name, reason))
        except (OSError, UnicodeDecodeError):
            source.bad.append((name, f"{caption.name} is not UTF-8 text"))
        else:
            source.add(Item(name, image, text, _same_prompt(text), name=shown))
    return source


def _match(
    folder: Path, images: Sequence[Path], prompts: Sequence[Prompt], *, every_prompt: bool
) -> Source:
    source = Source()
    by_id = {prompt.id: prompt for prompt in prompts}
    found: set[str] = set()
    for image in images:
        name = _name(image, folder)
        prompt = _prompt_of(image.stem, by_id)
        if prompt is None:
            first = next(iter(by_id))
            reason = f"no prompt of the set has its name as id (they are like {first!r})"
            source.bad.append((name, reason))
            continue
        found.add(prompt.id)
        shown = image.relative_to(folder).as_posix()
        source.add(Item(name, image, prompt.text, prompt.id, prompt.style, shown))
    source.bad += [
        (prompt.id, "the prompt has no image in the folder")
        for prompt in prompts
        if every_prompt and prompt.id not in found
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
        record = {_SAME.get(key, key): value for key, value in row.items() if value is not None}
        name = str(record.get("id", ""))
        image, prompt = record.get("image"), record.get("prompt")
        if not isinstance(image, str) or not image:
            source.bad.append((name or f"line {number}", f"{path.name}, line {number}: no 'image'"))
            continue
        name = name or Path(image).with_suffix("").as_posix()
        if not isinstance(prompt, str):
            source.bad.append((name, f"{path.name}, line {number}: no 'prompt', or not a text"))
            continue
        text, style = prompt.strip(), str(record.get("style", ""))
        prompt_id = str(record.get("prompt_id", "")) or _same_prompt(text)
        source.add(Item(name, path.parent / image, text, prompt_id, style or None, image))
    return _without_duplicates(source)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV or JSONL file with their line numbers."""
    kind, number = path.suffix.lower(), 0
    if kind not in (".csv", ".jsonl"):
        raise UserError(f"{path}: a manifest is a .csv or .jsonl file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if kind == ".csv":
                reader = csv.DictReader(lines, strict=True)
                for row in reader:
                    number = reader.line_num
                    # What is beyond the last column, or a column that is not there.
                    if None in row or None in row.values():
                        raise ValueError(
                            "another number of columns than the first line; "
                            "put texts with a comma in double quotes"
                        )
                    yield number, row
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    yield number, row
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {number}: {error}") from None


def _without_duplicates(source: Source) -> Source:
    """Which of several rows of one id is meant cannot be known: none of them is kept."""
    counts = Counter(item.id for item in source.items) + Counter(name for name, _ in source.bad)
    twice = dict.fromkeys(item.id for item in source.items if counts[item.id] > 1)
    source.bad += [
        (name, f"the id is there {counts[name]} times; give each row an id of its own")
        for name in twice
    ]
    source.items = [item for item in source.items if item.id not in twice]
    return source


def refuse_bad(source: Source, skip: bool, use: str = "scored") -> None:
    """Raises :class:`UserError` with all that is wrong, unless it is to be skipped.

    Also where nothing is left to be ``use``.
    """
    if source.bad and not skip:
        shown = "; ".join(f"{name}: {reason}" for name, reason in source.bad[:5])
        more = f"; and {len(source.bad) - 5} more" if len(source.bad) > 5 else ""
        raise UserError(
            f"{len(source.bad)} cannot be {use}: {shown}{more}; mend them, or leave them out "
            "with --skip-bad"
        )
    if not source.items:
        raise UserError(f"nothing is left to be {use}: every image or prompt is bad")
