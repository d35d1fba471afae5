"""The images to score, with their prompts, from a manifest or a folder.

A manifest is a table (CSV, TSV, JSON or JSON Lines) with the columns ``image`` (a path relative to
the manifest) and ``prompt``, and optionally ``id``, ``prompt_id`` and ``style``. Rows without a
``prompt_id`` are grouped by equal prompts. A folder's images find their prompts

- in a prompt set, by the name of the file: ``<prompt id>.png``, or ``<prompt id>_<anything>.png``
  for several images of one prompt;
- in the table called ``manifest`` or ``metadata`` in it, e.g. ``metadata.jsonl`` (``file_name``,
  ``text``);
- beside them, in ``<name>.txt`` or ``<name>.png.txt``.

Every image, every row and every prompt or caption without an image becomes an item or an error with
a reason.
"""

import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import normalize

from benchmarks.evaluation.scoring.folders import Listing, list_files
from g2rpo.data.images import image_suffixes, is_image
from g2rpo.data.prompts import Prompt
from g2rpo.data.tables import (
    PROMPT_COLUMNS,
    SUFFIXES,
    Row,
    by_name,
    read_table,
    read_text,
)
from g2rpo.errors import UserError
from g2rpo.text import is_unicode

MANIFESTS = frozenset(
    f"{stem}{suffix}"
    for stem in ("manifest", "metadata")
    for suffix in (
        ".csv",
        ".tsv",
        ".jsonl",
        ".ndjson",
    )  # manifest.json describes how images were made
)
"""Lower-case names of the table in a folder that lists its images."""
UNSUPPORTED = frozenset({".heic", ".heif", ".jxl"})
"""Suffixes of image formats that Pillow does not read."""
NO_IMAGES = frozenset({".txt", *UNSUPPORTED})
TABLES = frozenset(SUFFIXES) - {".yaml", ".yml"}
IMAGE_COLUMNS = ("image", "file_name")
"""Names of a manifest's image column; the first one present is read."""
OTHER_COLUMNS = ("id", "prompt_id", "style")
NO_IMAGE = {
    "prompt without an image in the folder": "prompt",
    "caption without a readable image": "caption",
}
"""Why a file cannot be scored, and what kind of file it is."""
NO_CAPTIONS = frozenset({"readme", "license", "licence", "notice"})
"""Stems of text files that are not captions."""


@dataclass(frozen=True)
class Item:
    """One image and the prompt it is scored against.

    Attributes:
        id: unique id of the row.
        image: the file.
        prompt: the prompt's text.
        prompt_id: shared by the images of one prompt.
        style: the prompt's style, if its set has styles.
        name: the name of the image in results: its path inside the source.
    """

    id: str
    image: Path
    prompt: str
    prompt_id: str
    style: str | None = None
    name: str = ""


@dataclass
class Source:
    """Items to score, and what cannot be scored.

    Attributes:
        items: what can be scored.
        bad: what cannot: pairs of a name and a reason.
        notes: which columns were read.
    """

    items: list[Item] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def found(self) -> int:
        """Number of items and of what cannot be scored."""
        return len(self.items) + len(self.bad)

    def add(self, item: Item) -> None:
        """Adds ``item``, or the reason why it cannot be scored."""
        reason = _problem(item)
        if reason is None:
            self.items.append(item)
        else:
            self.refuse(item.id, reason)

    def refuse_prompts(self, reward: str, reasons: Mapping[str, str]) -> None:
        """Refuses the items whose prompt ``reward`` cannot score, by the reason of each prompt."""
        items, self.items = self.items, []
        for item in items:
            if item.prompt in reasons:
                self.refuse(item.id, f"{reward}: {reasons[item.prompt]}")
            else:
                self.items.append(item)

    def refuse(self, name: str, reason: str) -> None:
        """Adds something that cannot be scored."""
        self.bad.append((name if is_unicode(name) else ascii(name), reason))


def _problem(item: Item) -> str | None:
    """Why ``item`` cannot be scored, without reading the image; None if it may be."""
    if not item.prompt.strip():
        return "empty prompt"
    if not is_unicode(item.prompt + item.id):
        return "prompt or id is not valid Unicode"
    try:
        str(item.image).encode(sys.getfilesystemencoding())
        if not item.image.is_file():
            reason = "not a file" if item.image.exists() else "no such image"
            return f"{reason}: {item.image}"
    except UnicodeEncodeError:
        return _undecoded()
    except OSError as error:
        return f"cannot be read ({error.strerror}): {item.image}"
    return None


def _undecoded() -> str:
    """Why a file name cannot be decoded."""
    encoding = sys.getfilesystemencoding()
    if encoding.lower() != "utf-8":
        return f"file names are decoded as {encoding}; set LC_ALL=C.UTF-8"
    return "path is not UTF-8; rename the file or folder"


def read_source(
    path: Path, prompts: Sequence[Prompt] | None = None, *, every_prompt: bool = True
) -> Source:
    """The items of a folder or manifest ``path``.

    Args:
        path: the folder or manifest.
        prompts: the prompts of a folder's images.
        every_prompt: whether a prompt without an image is an error.

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
        source, _ = _read_manifest(path)
    if not source.found:
        kind = "folder" if path.is_dir() else "manifest"
        raise UserError(f"{path}: no images to score in this {kind}")
    return _without_ambiguous(source)


def _read_folder(folder: Path, prompts: Sequence[Prompt] | None, *, every_prompt: bool) -> Source:
    listing = list_files(folder)
    manifests = [
        path for path in listing.files if path.parent == folder and path.name.lower() in MANIFESTS
    ]
    if prompts is not None:
        source = _match(listing, prompts, every_prompt=every_prompt)
    elif len(manifests) > 1:
        names = " and ".join(path.name for path in manifests)
        raise UserError(f"{folder}: contains {names}; pass the one to score instead")
    elif manifests:
        source = _listed(listing, manifests[0])
    else:
        source = _captioned(listing)
    for name, reason in listing.broken:
        source.refuse(name, reason)
    for path in listing.files:
        if path.suffix.lower() in UNSUPPORTED:
            source.refuse(listing.name(path), "unsupported image format; convert it to PNG")
    return source


def _has_suffix(path: Path) -> bool:
    return path.suffix.lower() in image_suffixes()


def _stem(name: str) -> str:
    """``name`` without its suffix; a dot may also be part of the name, as in 0.5."""
    return re.sub(r"\.[A-Za-z][A-Za-z0-9]{0,4}$", "", name)


def _same_prompt(prompt: str) -> str:
    """The id of a prompt without one, by its text."""
    return hashlib.sha256(prompt.encode(errors="replace")).hexdigest()[:12]


def _listed(listing: Listing, manifest: Path) -> Source:
    source, images = _read_manifest(manifest)
    named = {image.resolve() for image in images}
    for image in listing.files:
        if _has_suffix(image) and image.resolve() not in named:
            name = _stem(listing.name(image))
            source.refuse(name, f"no prompt: not listed in {manifest.name}")
    return source


def _images(
    listing: Listing, source: Source, named: Callable[[str], object]
) -> Iterator[tuple[Path, str]]:
    """Files with an image suffix, or that are ``named`` and contain an image.

    A link to another of the files counts only if it is named itself.
    """
    for path in listing.files:
        shown, suffix = listing.name(path), path.suffix.lower()
        if suffix in NO_IMAGES or not (_has_suffix(path) or (named(shown) and is_image(path))):
            continue
        if not is_unicode(shown):
            source.refuse(shown, _undecoded())
        elif path not in listing.aliases or named(shown):
            yield path, shown


def _captioned(listing: Listing) -> Source:
    source = Source()
    texts = [path for path in listing.files if path.suffix.lower() == ".txt"]
    find = by_name({listing.name(path)[: -len(".txt")]: path for path in texts})

    def captions(shown: str) -> list[Path]:
        return [path for path in {find(_stem(shown)), find(shown)} if path is not None]

    # Captions of images that are refused anyway are not reported too.
    others = map(listing.name, set(listing.files) - set(texts))
    used = {
        caption
        for name in others
        if Path(name).suffix.lower() in UNSUPPORTED or not is_unicode(name)
        for caption in captions(name)
    }
    for image, shown in _images(listing, source, captions):
        beside = captions(shown)
        name = _stem(shown if _has_suffix(image) else listing.name(beside[0]))
        used.update(beside)
        if not beside:
            reason = f"no prompt; pass --prompts, or add {_stem(image.name)}.txt or a manifest"
            source.refuse(name, reason)
        elif len(beside) > 1:
            names = " and ".join(sorted(path.name for path in beside))
            source.refuse(name, f"has two captions, {names}; remove one")
        else:
            try:
                text = read_text(beside[0]).strip()
            except UserError as error:
                source.refuse(name, str(error))
            else:
                source.add(Item(name, image, text, _same_prompt(text), name=shown))
    for caption in texts:
        known = caption in used or caption in listing.aliases
        if not known and _stem(caption.name).lower() not in NO_CAPTIONS:
            source.refuse(listing.name(caption), "caption without a readable image")
    return _without_aliases(source, listing)


def _match(listing: Listing, prompts: Sequence[Prompt], *, every_prompt: bool) -> Source:
    source = Source()
    find = by_name({prompt.id: prompt for prompt in prompts})

    def prompt_of(shown: str) -> Prompt | None:
        name = shown.rpartition("/")[2]
        return find(name) or _prompt_of(_stem(name), find)

    found: set[str] = set()
    for image, shown in _images(listing, source, prompt_of):
        prompt = prompt_of(shown)
        if prompt is None:
            reason = f"no prompt has this name as its id; a fitting one is {prompts[0].id}.png"
            source.refuse(_stem(shown), reason)
            continue
        found.add(prompt.id)
        whole = not _has_suffix(image) and find(image.name) is not None
        name = shown if whole else _stem(shown)
        source.add(Item(name, image, prompt.text, prompt.id, prompt.style, shown))
    for prompt in prompts:
        if every_prompt and prompt.id not in found:
            source.refuse(prompt.id, "prompt without an image in the folder")
    return _without_aliases(source, listing)


def _prompt_of(stem: str, find: Callable[[str], Prompt | None]) -> Prompt | None:
    """The prompt whose id is ``stem`` or its longest prefix before an underscore."""
    while (prompt := find(stem)) is None:
        stem, mark, _ = stem.rpartition("_")
        if not mark:
            return None
    return prompt


def _without_aliases(source: Source, listing: Listing) -> Source:
    """Drops links to an image that is scored with the same prompt under its own name."""
    own = {(item.image, item.prompt_id) for item in source.items}
    kept = [
        item
        for item in source.items
        if (listing.aliases.get(item.image), item.prompt_id) not in own
    ]
    source.items = kept
    return source


def _read_manifest(path: Path) -> tuple[Source, list[Path]]:
    """The rows of a manifest, and all existing images that they name."""
    if path.suffix.lower() not in TABLES:
        raise UserError(
            f"{path}: not a manifest; use a .csv or .jsonl file (or .tsv, .json, .ndjson)"
        )
    source, images = Source(), []
    malformed: list[tuple[str, str]] = []
    table = read_table(path, (*IMAGE_COLUMNS, *PROMPT_COLUMNS, *OTHER_COLUMNS), malformed=malformed)
    for place, reason in malformed:
        source.refuse(place, reason)
    columns = table.column(IMAGE_COLUMNS), table.column(PROMPT_COLUMNS)
    source.notes.append(
        f"{path.name}: reading images from {columns[0]!r} and prompts from {columns[1]!r}"
        f"{table.not_read((*columns, *OTHER_COLUMNS))}"
    )
    for row in table.rows:
        if not row.is_blank:
            images += _add_row(source, path, row, columns)
    return source, images


def _add_row(source: Source, manifest: Path, row: Row, columns: tuple[str, str]) -> list[Path]:
    """Adds one row of a manifest; returns the existing image that it names, if any."""
    record = {key: value for key, value in row.values.items() if value is not None}
    image, prompt = (record.get(column) for column in columns)
    given, prompt_id, style = (str(record.get(name, "")).strip() for name in OTHER_COLUMNS)
    place = f"{manifest.name}, {row.place}"
    if not isinstance(image, str) or not image.strip():
        source.refuse(given or row.place, f"{place}: no {columns[0]!r}")
        return []
    path = _existing(manifest.parent, image)
    name = given or _stem(Path(image.replace("\\", "/")).as_posix())
    odd = next((key for key in OTHER_COLUMNS if not _is_name(record.get(key, ""))), None)
    if odd is not None:
        source.refuse(name, f"{place}: {odd!r} is neither text nor a number")
    elif not isinstance(prompt, str):
        source.refuse(name, f"{place}: {columns[1]!r} is missing or not text")
    else:
        text = prompt.strip()
        source.add(Item(name, path, text, prompt_id or _same_prompt(text), style or None, image))
    return [path] if _exists(path) else []


def _is_name(value: Any) -> bool:
    """Whether a value of a manifest can be an id or a style: text or a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str) or (number and math.isfinite(value))


def _existing(folder: Path, image: str) -> Path:
    """The file that a manifest names, possibly with a path from another operating system."""
    for text in (image, image.strip(), image.strip().replace("\\", "/")):
        if _exists(folder / text):
            return folder / text
        # Folders and files may have different Unicode normal forms.
        there = {folder}
        for part in Path(text).parts:
            spelt = {one / normalize(form, part) for one in there for form in ("NFC", "NFD")}
            there = {path for path in spelt if _exists(path)}
        if len(there) == 1:
            return there.pop()
    return folder / image


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long, or no permission
        return False


def _without_ambiguous(source: Source) -> Source:
    """Refuses images that share an id and prompts that share a prompt_id."""
    counts = Counter(item.id for item in source.items) + Counter(name for name, _ in source.bad)
    prompts = Counter(prompt_id for prompt_id, _ in {(i.prompt_id, i.prompt) for i in source.items})
    items, source.items = source.items, []
    for item in items:
        if counts[item.id] > 1:
            reason = (
                f"duplicate id ({counts[item.id]} times, here {item.name}); rename the image, or "
                "set a unique id in the manifest"
            )
        elif prompts[item.prompt_id] > 1:
            reason = (
                f"prompt_id {item.prompt_id!r} is used for {prompts[item.prompt_id]} prompts; "
                "use one per prompt, or drop the column"
            )
        else:
            source.items.append(item)
            continue
        source.bad.append((item.id, reason))
    return source


def refuse_bad(source: Source, skip: bool, use: str = "scored", noun: str = "image") -> None:
    """Raises :class:`UserError` if anything is bad and not skipped, or nothing can be ``use``.

    The message counts what is bad as ``noun``, or as in :data:`NO_IMAGE` where there is no image.
    """
    if source.bad and not skip:
        counts = Counter(NO_IMAGE.get(reason, noun) for _, reason in source.bad)
        what = " and ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items())
        fix = "fix them" if len(source.bad) > 1 else "fix it"
        raise UserError(f"{what} cannot be {use}: {first_of(source.bad)}; {fix} or pass --skip-bad")
    if not source.items:
        raise UserError(f"nothing can be {use}: {first_of(source.bad)}")


def first_of(bad: Sequence[tuple[str, str]]) -> str:
    """The first reasons, each once with its first names, and the number of others in one line."""
    named: dict[str, list[str]] = {}
    for name, reason in bad:
        named.setdefault(reason, []).append(name)
    first = dict(list(named.items())[:5])
    parts = [f"{_first_names(names)}: {reason}" for reason, names in first.items()]
    others = len(bad) - sum(map(len, first.values()))
    return "; ".join([*parts, f"and {others} more"] if others else parts)


def _first_names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
