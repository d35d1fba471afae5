"""The published prompt sets: fetched, counted, and written as the profiles expect them.

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
"""As many as the test list has."""
SETS = {"hpdv2": ("hpdv2-train", "hpdv2-test"), "hpsv2-benchmark": ("hpsv2-benchmark",)}


def artifact_named(name: str) -> Artifact:
    """The prompt list of the catalogue with that name."""
    return catalogue().select([name], ("prompts",))[0]


def check_count(artifact: Artifact, found: int) -> None:
    """Raises :class:`UserError` where a list has not as many prompts as it should."""
    if artifact.prompts is not None and found != artifact.prompts:
        raise UserError(
            f"{artifact.name}: {found} prompts where {artifact.prompts} are expected; the "
            f"published list has changed, see {artifact.page}"
        )


def read_lines(artifact: Artifact, path: Path) -> list[str]:
    """The lines of a published list, counted; empty ones are then left out.

    Raises:
        UserError: it is not UTF-8 text or has another number of lines than the catalogue states.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{artifact.name}: {path} is not UTF-8 text; fetch it again") from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    check_count(artifact, len(lines))
    # A carriage return inside a line would become a line break of our file.
    return [" ".join(line.split("\r")).strip() for line in lines if line.strip()]


def split_validation(
    train: Sequence[str], test: Sequence[str], count: int
) -> tuple[list[str], list[str]]:
    """Parts ``train`` into what is trained on and ``count`` prompts to validate on.

    The validation prompts are those whose normalised text has the smallest SHA-256, without the
    test's, so the choice depends on no order and no generator. Neither part has a prompt of the
    other, even after normalising; both keep the order of ``train``.

    Raises:
        UserError: ``train`` has not enough distinct prompts.
    """
    keys = [normalise(text) for text in train]
    held_out = {normalise(text) for text in test}
    candidates = sorted(
        set(keys) - held_out, key=lambda key: hashlib.sha256(key.encode()).hexdigest()
    )
    if len(candidates) <= count:
        raise UserError(f"{len(candidates)} distinct prompts are too few to hold out {count}")
    chosen = set(candidates[:count])
    rest = [text for text, key in zip(train, keys, strict=True) if key not in chosen]
    first = {key: text for text, key in zip(reversed(train), reversed(keys), strict=True)}
    return rest, [first[key] for key in dict.fromkeys(keys) if key in chosen]


def _numbered(texts: Sequence[str]) -> list[Prompt]:
    return [Prompt(f"{number:06d}", text) for number, text in enumerate(texts)]


def fetch_hpdv2(folder: Path, lock: Lock, options: FetchOptions) -> list[Path]:
    """Writes ``train.txt``, ``validation.txt`` and ``test.txt`` into ``folder``; gives their paths.

    Raises:
        UserError: a list cannot be had or is not the published one.
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
    """Writes ``benchmark.jsonl``: the HPS benchmark, its ids ``STYLE-NUMBER``, with styles.

    Raises:
        UserError: a list cannot be had or is not the published one.
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
