"""Summaries of prompt sets, and the prompts that two sets share."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.files import sha256_file

_DROPPED = "PZC"
"""Unicode categories of punctuation, separators and control characters."""


def normalise(text: str) -> str:
    """``text`` without differences in case, width, punctuation and spaces.

    Unicode NFKC and case folding; runs of punctuation, separators and control characters become one
    space, unless the text has nothing else. Idempotent.
    """
    while True:
        folded = unicodedata.normalize("NFKC", text).casefold()
        kept = "".join(" " if unicodedata.category(c)[0] in _DROPPED else c for c in folded)
        shorter = " ".join(kept.split()) or " ".join(folded.split())
        if shorter == text:
            return text
        text = shorter


@dataclass(frozen=True)
class Overlap:
    """Distinct texts that two sets share, exactly and after :func:`normalise`; sorted."""

    exact: tuple[str, ...]
    normalised: tuple[str, ...]


def overlap(first: Iterable[Prompt], second: Iterable[Prompt]) -> Overlap:
    """The prompts that two sets share; symmetric."""
    ours, theirs = {p.text for p in first}, {p.text for p in second}
    same = {normalise(text) for text in ours} & {normalise(text) for text in theirs}
    return Overlap(tuple(sorted(ours & theirs)), tuple(sorted(same)))


@dataclass(frozen=True)
class SetSummary:
    """Statistics of a set and its file; ``distinct`` is the prompts after :func:`normalise`."""

    prompts: int
    distinct: int
    words: int
    bytes: int
    sha256: str


def summarise(path: Path) -> SetSummary:
    """Statistics of the set at ``path``; raises like :func:`read_prompts`."""
    prompts = read_prompts(path)
    return SetSummary(
        prompts=len(prompts),
        distinct=len({normalise(prompt.text) for prompt in prompts}),
        words=sum(len(prompt.text.split()) for prompt in prompts),
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
    )
