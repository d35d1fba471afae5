"""Fetches the published prompt sets, counts them, and writes them for profiles and scorers.

``hpdv2`` becomes ``train.txt``, ``validation.txt`` and ``test.txt``. Every benchmark becomes one
JSON Lines file with ``prompt``, ``id``, its category as ``style``, and, where the published set has
more that a scorer needs, those keys as published.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from g2rpo.data.overlap import normalise
from g2rpo.data.prompts import write_texts
from g2rpo.data.tables import PROMPT_COLUMNS, read_table, read_text
from g2rpo.errors import UserError
from g2rpo.files import atomic_write_text
from g2rpo.hub.catalogue import Artifact, catalogue
from g2rpo.hub.fetch import FetchOptions, fetch
from g2rpo.hub.lock import Lock

Entry = dict[str, Any]
"""A prompt of a benchmark: ``prompt``, ``id``, perhaps ``style``, and keys as published."""
VALIDATION_PROMPTS = 400
"""As many as in the test list."""


def artifact_named(name: str) -> Artifact:
    """The prompt list ``name`` in the catalogue."""
    return catalogue().select([name], ("prompts",))[0]


def check_count(artifact: Artifact, found: int, what: str = "prompts") -> None:
    """Raises :class:`UserError` unless a list has as many ``what`` as the catalogue says."""
    stated = getattr(artifact, what)
    if stated is not None and found != stated:
        raise UserError(
            f"{artifact.name}: {found} {what}, expected {stated}; the published list has changed, "
            f"see {artifact.page}"
        )


def read_lines(artifact: Artifact, path: Path) -> list[str]:
    """The non-empty lines of a published list.

    Raises:
        UserError: it is not UTF-8 text, or has another number of lines than in the catalogue.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{artifact.name}: {path} is not UTF-8 text; fetch it again") from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    check_count(artifact, len(lines))
    # A carriage return within a line would become a line break in our file.
    return [" ".join(line.split("\r")).strip() for line in lines if line.strip()]


def split_validation(
    train: Sequence[str], test: Sequence[str], count: int
) -> tuple[list[str], list[str]]:
    """Splits ``train`` into training prompts and ``count`` validation prompts.

    The validation prompts are those with the smallest SHA-256 of the normalised text, excluding
    test prompts, so the choice depends on no order or random generator. The two parts are disjoint
    even after normalisation; both keep the order of ``train``.

    Raises:
        UserError: ``train`` has too few distinct prompts.
    """
    keys = [normalise(text) for text in train]
    held_out = {normalise(text) for text in test}
    candidates = sorted(
        set(keys) - held_out, key=lambda key: hashlib.sha256(key.encode()).hexdigest()
    )
    if len(candidates) <= count:
        raise UserError(f"cannot hold out {count} prompts: only {len(candidates)} are distinct")
    chosen = set(candidates[:count])
    rest = [text for text, key in zip(train, keys, strict=True) if key not in chosen]
    first = {key: text for text, key in zip(reversed(train), reversed(keys), strict=True)}
    return rest, [first[key] for key in dict.fromkeys(keys) if key in chosen]


def _fetch_hpdv2(folder: Path, lock: Lock, options: FetchOptions) -> list[Path]:
    artifacts = map(artifact_named, SETS["hpdv2"])
    lists = [read_lines(each, fetch(each, lock, options)[0]) for each in artifacts]
    train, validation = split_validation(lists[0], lists[1], VALIDATION_PROMPTS)
    parts = {"train.txt": train, "validation.txt": validation, "test.txt": lists[1]}
    for name, texts in parts.items():
        write_texts(folder / name, texts)
    return [folder / name for name in parts]


def _json_list(path: Path) -> list[Entry]:
    """A list of strings; the file is named after their category."""
    try:
        texts = json.loads(read_text(path))
    except ValueError:
        raise UserError(f"{path} is not valid JSON; fetch it again") from None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path} is not a list of prompts")
    return _of_category(texts, path.stem)


def _text_lines(path: Path) -> list[Entry]:
    """One prompt per line; the file is named CATEGORY_val.txt."""
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    return _of_category([line for line in lines if line.strip()], path.stem.removesuffix("_val"))


def _of_category(texts: Sequence[str], style: str) -> list[Entry]:
    return [
        {"prompt": text.strip(), "id": f"{style}-{number:05d}", "style": style}
        for number, text in enumerate(texts)
    ]


def _table(path: Path, style: Callable[[Entry], str], keep: Sequence[str] = ()) -> list[Entry]:
    """A table with one prompt per row, whose category is ``style(row)``.

    The columns ``keep`` are kept as published, where a row has them.
    """
    table = read_table(path, (*PROMPT_COLUMNS, "category"))
    column = table.column(PROMPT_COLUMNS)
    entries: list[Entry] = []
    for row in table.rows:
        if row.is_blank:
            continue
        values = dict(row.values)
        try:
            entry = {
                "prompt": values[column].strip(),
                "id": f"{len(entries):05d}",
                "style": style(values),
            }
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{path}, {row.place}: not in the published format") from None
        entries.append(entry | {key: values[key] for key in keep if key in values})
    return entries


DPG_COLUMNS = (
    "proposition_id", "dependency", "category_broad", "category_detailed", "tuple",
    "question_natural_language",
)  # fmt: skip
"""What DPG-Bench's scorer reads of a question; categories are of questions, not of prompts."""


def _dpg_bench(path: Path) -> list[Entry]:
    """One row per question; those of a prompt share ``item_id``."""
    table = read_table(path, ("item_id", "text", *DPG_COLUMNS))
    entries: dict[str, Entry] = {}
    for row in table.rows:
        if row.is_blank:
            continue
        try:
            identity, text = row.values["item_id"].strip(), row.values["text"].strip()
            question = {column: row.values[column] for column in DPG_COLUMNS}
        except KeyError:
            raise UserError(f"{path}, {row.place}: not in the published format") from None
        entry = entries.setdefault(identity, {"prompt": text, "id": identity, "questions": []})
        if entry["prompt"] != text:
            raise UserError(f"{path}, {row.place}: {identity} has two texts")
        entry["questions"].append(question)
    return list(entries.values())


BENCHMARKS: dict[str, Callable[[Path], list[Entry]]] = {
    "hpsv2-benchmark": _json_list,
    "drawbench": lambda path: _table(path, lambda row: row["category"].strip()),
    "partiprompts": lambda path: _table(
        path, lambda row: row["category"].strip(), keep=("challenge",)
    ),
    "geneval": lambda path: _table(
        path, lambda row: row["tag"], keep=("tag", "include", "exclude")
    ),
    "geneval2": lambda path: _table(
        path,
        lambda row: f"{row['atom_count']:02d} atoms",
        keep=("atom_count", "vqa_list", "skills"),
    ),
    "t2i-compbench": _text_lines,
    "dpg-bench": _dpg_bench,
}
"""Reads a file of the artifact of the same name."""
SETS: dict[str, dict[str, Path]] = {
    "hpdv2": {"hpdv2-train": Path("hpdv2/train.txt"), "hpdv2-test": Path("hpdv2/test.txt")},
    **{name: {name: Path("prompts", f"{name}.jsonl")} for name in BENCHMARKS},
    "hpsv2-benchmark": {"hpsv2-benchmark": Path("hpdv2/benchmark.jsonl")},
}
"""The artifacts of each set, and the files they become, below the folder of all data."""


def fetch_set(name: str, folder: Path | None, lock: Lock, options: FetchOptions) -> list[Path]:
    """Writes the set ``name`` to ``folder`` (None: its own, below ``data``); returns the paths.

    Raises:
        UserError: a list cannot be fetched, or is not the published one.
    """
    place = Path("data") / next(iter(SETS[name].values()))
    path = place if folder is None else folder / place.name
    if name == "hpdv2":
        return _fetch_hpdv2(path.parent, lock, options)
    artifact = artifact_named(name)
    files = fetch(artifact, lock, options)
    entries = [entry for file in files for entry in BENCHMARKS[name](file)]
    check_count(artifact, len(entries))
    check_count(artifact, len({entry.get("style") for entry in entries} - {None}), "categories")
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    atomic_write_text(path, "".join(lines))
    return [path]
