"""What is scored: image files with their prompts, from a manifest or from a folder.

A manifest is a table (CSV, TSV, JSON or JSON Lines) with the columns ``image`` (a path, from the
manifest's folder) and ``prompt``, and optionally ``id``, ``prompt_id`` and ``style``; others are
not read. Rows without a ``prompt_id`` belong together where their prompts are equal. A folder's
images find their prompts

- in a prompt set, by the name of the file: ``<prompt id>.png``, or ``<prompt id>_<anything>.png``
  for several images of one prompt;
- in the table called ``manifest`` or ``metadata`` in it, e.g. ``metadata.jsonl`` (``file_name``,
  ``text``);
- beside them, in ``<name>.txt`` or ``<name>.png.txt``.

Every image, every row, and every prompt or caption without an image is either an item or named with
what is wrong with it; :attr:`Source.found` counts them.
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from unicodedata import normalize

from benchmarks.evaluation.scoring.folders import Listing, list_files
from g2rpo.data.images import image_suffixes, is_image
from g2rpo.data.prompts import Prompt
from g2rpo.data.tables import (
    PROMPT_COLUMNS,
    SUFFIXES,
    Row,
    by_name,
    is_unicode,
    read_table,
    read_text,
)
from g2rpo.errors import UserError

MANIFESTS = frozenset(
    f"{stem}{suffix}"
    for stem in ("manifest", "metadata")
    for suffix in (".csv", ".tsv", ".jsonl", ".ndjson")  # a manifest.json says how images were made
)
"""Names, in lower case, of the table in a folder that lists its images."""
UNSUPPORTED = frozenset({".heic", ".heif", ".jxl"})
"""Names of images that Pillow does not read."""
NO_IMAGES = frozenset({".txt", *UNSUPPORTED})
TABLES = frozenset(SUFFIXES) - {".yaml", ".yml"}
IMAGE_COLUMNS = ("image", "file_name")
"""Names of a manifest's column of images; the first of them that it has is read."""
OTHER_COLUMNS = ("id", "prompt_id", "style")
NO_CAPTIONS = frozenset({"readme", "license", "licence", "notice"})
"""Names of text files that are often in a folder and no captions."""


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
    """Items to score, and what is wrong with others.

    Attributes:
        items: what can be scored.
        bad: pairs of a name and a reason.
        found: how many there are together.
        notes: which columns were read.
    """

    items: list[Item] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    found: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, item: Item) -> None:
        """Takes in ``item``, or what is wrong with it."""
        reason = _problem(item)
        if reason is None:
            self.found += 1
            self.items.append(item)
        else:
            self.refuse(item.id, reason)

    def refuse(self, name: str, reason: str) -> None:
        """Names what cannot be scored."""
        self.found += 1
        self.bad.append((name if is_unicode(name) else ascii(name), reason))


def _problem(item: Item) -> str | None:
    """Why ``item`` cannot be scored, as far as that is known without reading the image."""
    if not item.prompt.strip():
        return "its prompt is empty"
    if not is_unicode(item.prompt + item.id):
        return "its prompt or id is not valid Unicode"
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
    """Why the name of a file cannot be read as text."""
    encoding = sys.getfilesystemencoding()
    if encoding.lower() != "utf-8":
        return f"the locale reads file names as {encoding}; set LC_ALL=C.UTF-8"
    return "its path is not UTF-8; rename the file or folder"


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
        source, _ = _read_manifest(path)
    if not source.found:
        place = "in it or below" if path.is_dir() else "for it has no rows"
        raise UserError(f"{path}: no images to score {place}")
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
        raise UserError(f"{folder}: has {names}; name the one to score instead of the folder")
    elif manifests:
        source = _listed(listing, manifests[0])
    else:
        source = _captioned(listing)
    for name, reason in listing.broken:
        source.refuse(name, reason)
    for path in listing.files:
        if path.suffix.lower() in UNSUPPORTED:
            source.refuse(listing.name(path), "Pillow does not read such images; convert it")
    return source


def _has_suffix(path: Path) -> bool:
    return path.suffix.lower() in image_suffixes()


def _stem(name: str) -> str:
    """``name`` without its suffix; what is after a dot may also belong to the name, as in 0.5."""
    return re.sub(r"\.[A-Za-z][A-Za-z0-9]{0,4}$", "", name)


def _same_prompt(prompt: str) -> str:
    """The id of a prompt that has none: equal prompts are one."""
    return hashlib.sha256(prompt.encode(errors="replace")).hexdigest()[:12]


def _listed(listing: Listing, manifest: Path) -> Source:
    source, images = _read_manifest(manifest)
    named = {image.resolve() for image in images}
    for image in listing.files:
        if _has_suffix(image) and image.resolve() not in named:
            name = _stem(listing.name(image))
            source.refuse(name, f"no prompt: {manifest.name} does not list it")
    return source


def _images(
    listing: Listing, source: Source, named: Callable[[str], object]
) -> Iterator[tuple[Path, str]]:
    """The files with the suffix of an image, or whose name is ``named`` and content one.

    A link to another of the files is one only where it is named itself.
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

    # What is named for another reason takes its caption along.
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
            reason = f"no prompt: give --prompts, or write {_stem(image.name)}.txt or a manifest"
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
            source.refuse(listing.name(caption), "a caption without an image that can be read")
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
            reason = f"no prompt of the set has its name as id (they are like {prompts[0].id!r})"
            source.refuse(_stem(shown), reason)
            continue
        found.add(prompt.id)
        whole = not _has_suffix(image) and find(image.name) is not None
        name = shown if whole else _stem(shown)
        source.add(Item(name, image, prompt.text, prompt.id, prompt.style, shown))
    for prompt in prompts:
        if every_prompt and prompt.id not in found:
            source.refuse(prompt.id, "the prompt has no image in the folder")
    return _without_aliases(source, listing)


def _prompt_of(stem: str, find: Callable[[str], Prompt | None]) -> Prompt | None:
    """The prompt whose id is ``stem``, or the longest part of it before an underscore."""
    while (prompt := find(stem)) is None:
        stem, mark, _ = stem.rpartition("_")
        if not mark:
            return None
    return prompt


def _without_aliases(source: Source, listing: Listing) -> Source:
    """Without links to an image that is scored with the same prompt under its own name."""
    own = {(item.image, item.prompt_id) for item in source.items}
    kept = [
        item
        for item in source.items
        if (listing.aliases.get(item.image), item.prompt_id) not in own
    ]
    source.found -= len(source.items) - len(kept)
    source.items = kept
    return source


def _read_manifest(path: Path) -> tuple[Source, list[Path]]:
    """What the rows of a manifest say, and all images that they name."""
    if path.suffix.lower() not in TABLES:
        raise UserError(f"{path}: a manifest is a .csv or .jsonl file (or .tsv, .json, .ndjson)")
    table = read_table(path, (*IMAGE_COLUMNS, *PROMPT_COLUMNS, *OTHER_COLUMNS))
    columns = table.column(IMAGE_COLUMNS), table.column(PROMPT_COLUMNS)
    source, images = Source(), []
    source.notes.append(
        f"{path.name}: images are read from {columns[0]!r}, prompts from {columns[1]!r}"
        f"{table.not_read((*columns, *OTHER_COLUMNS))}"
    )
    for row in table.rows:
        if not row.is_blank:
            images += _add_row(source, path, row, columns)
    return source, images


def _add_row(source: Source, manifest: Path, row: Row, columns: tuple[str, str]) -> list[Path]:
    """Takes in one row of a manifest; gives the image that it names, where there is one."""
    record = {key: value for key, value in row.values.items() if value is not None}
    image, prompt = (record.get(column) for column in columns)
    given, prompt_id, style = (str(record.get(name, "")).strip() for name in OTHER_COLUMNS)
    place = f"{manifest.name}, {row.place}"
    if not isinstance(image, str) or not image.strip():
        source.refuse(given or row.place, f"{place}: no {columns[0]!r}")
        return []
    path = _existing(manifest.parent, image)
    name = given or _stem(Path(image.replace("\\", "/")).as_posix())
    if not isinstance(prompt, str):
        source.refuse(name, f"{place}: no {columns[1]!r}, or not a text")
        return [path] if _exists(path) else []
    text = prompt.strip()
    source.add(Item(name, path, text, prompt_id or _same_prompt(text), style or None, image))
    return [path] if _exists(path) else []


def _existing(folder: Path, image: str) -> Path:
    """The file that a manifest names, maybe as Windows or another system would write it."""
    for text in (image, image.strip(), image.strip().replace("\\", "/")):
        if _exists(folder / text):
            return folder / text
        # Folders and files may come from different systems.
        forms = [{normalize(form, part) for form in ("NFC", "NFD")} for part in Path(text).parts]
        spelt = {folder.joinpath(*parts) for parts in product(*forms)}
        there = [path for path in spelt if _exists(path)]
        if len(there) == 1:
            return there[0]
    return folder / image


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder that may not be looked into
        return False


def _without_ambiguous(source: Source) -> Source:
    """Without images that share an id, and without prompts that share a prompt_id.

    Which of them is meant cannot be known: none is kept.
    """
    counts = Counter(item.id for item in source.items) + Counter(name for name, _ in source.bad)
    prompts = Counter(prompt_id for prompt_id, _ in {(i.prompt_id, i.prompt) for i in source.items})
    items, source.items = source.items, []
    for item in items:
        if counts[item.id] > 1:
            reason = (
                f"the id is there {counts[item.id]} times; rename the image, or give each row of "
                f"a manifest an id of its own (here {item.name})"
            )
        elif prompts[item.prompt_id] > 1:
            reason = (
                f"the prompt_id {item.prompt_id!r} stands for {prompts[item.prompt_id]} prompts; "
                "give each its own, or leave the column out"
            )
        else:
            source.items.append(item)
            continue
        source.bad.append((item.id, reason))
    return source


def refuse_bad(source: Source, skip: bool, use: str = "scored") -> None:
    """Raises :class:`UserError` with all that is wrong, unless it is to be skipped.

    Also where nothing is left to be ``use``.
    """
    if source.bad and not skip:
        raise UserError(
            f"{len(source.bad)} cannot be {use}: {first_of(source.bad)}; fix them, or leave them "
            "out with --skip-bad"
        )
    if not source.items:
        raise UserError(
            f"nothing is left to be {use}: every image or prompt is bad: {first_of(source.bad)}"
        )


def first_of(bad: Sequence[tuple[str, str]]) -> str:
    """The first names and reasons in one line, and how many more there are."""
    shown = "; ".join(f"{name}: {reason}" for name, reason in bad[:5])
    return f"{shown}; and {len(bad) - 5} more" if len(bad) > 5 else shown
