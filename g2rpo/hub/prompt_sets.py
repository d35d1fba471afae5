"""Fetches the published prompt sets, counts them, and writes them as the profiles expect.

``hpdv2`` becomes ``train.txt``, ``validation.txt`` and ``test.txt``; ``hpsv2-benchmark`` becomes
``benchmark.jsonl``, with styles.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from g2rpo.data.overlap import normalise
from g2rpo.data.prompts import Prompt, write_prompts
from g2rpo.errors import UserError
from g2rpo.hub.catalogue import Artifact, catalogue
from g2rpo.hub.fetch import FetchOptions, fetch
from g2rpo.hub.lock import Lock

VALIDATION_PROMPTS = 400
"""As many as in the test list."""
SETS = {"hpdv2": ("hpdv2-train", "hpdv2-test"), "hpsv2-benchmark": ("hpsv2-benchmark",)}


def artifact_named(name: str) -> Artifact:
    """The prompt list ``name`` in the catalogue."""
    return catalogue().select([name], ("prompts",))[0]


def check_count(artifact: Artifact, found: int) -> None:
    """Raises :class:`UserError` unless a list has the number of prompts in the catalogue."""
    if artifact.prompts is not None and found != artifact.prompts:
        raise UserError(
            f"{artifact.name}: {found} prompts, expected {artifact.prompts}; the published list "
            f"has changed, see {artifact.page}"
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


def _numbered(texts: Sequence[str]) -> list[Prompt]:
    return [Prompt(f"{number:06d}", text) for number, text in enumerate(texts)]


def fetch_hpdv2(folder: Path, lock: Lock, options: FetchOptions) -> list[Path]:
    """Writes ``train.txt``, ``validation.txt`` and ``test.txt`` to ``folder``; returns the paths.

    Raises:
        UserError: a list cannot be fetched, or is not the published one.
    """
    lists = []
    for name in SETS["hpdv2"]:
        artifact = artifact_named(name)
        lists.append(read_lines(artifact, fetch(artifact, lock, options)[0]))
    train, validation = split_validation(lists[0], lists[1], VALIDATION_PROMPTS)
    parts = {"train.txt": train, "validation.txt": validation, "test.txt": lists[1]}
    for name, texts in parts.items():
        write_prompts(folder / name, _numbered(texts))
    return [folder / name for name in parts]


def fetch_benchmark(folder: Path, lock: Lock, options: FetchOptions) -> list[Path]:
    """Writes ``benchmark.jsonl``: the HPS benchmark with styles and ids ``STYLE-NUMBER``.

    Raises:
        UserError: a list cannot be fetched, or is not the published one.
    """
    artifact = artifact_named("hpsv2-benchmark")
    prompts: list[Prompt] = []
    for path in fetch(artifact, lock, options):
        style = path.stem
        try:
            texts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{artifact.name}: {path} is not valid JSON; fetch it again") from None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{artifact.name}: {path} is not a list of prompts")
        numbered = enumerate(texts)
        prompts += [Prompt(f"{style}-{n:05d}", text.strip(), style) for n, text in numbered]
    check_count(artifact, len(prompts))
    write_prompts(folder / "benchmark.jsonl", prompts)
    return [folder / "benchmark.jsonl"]
