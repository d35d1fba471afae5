"""What a prompt set holds, and which prompts two sets share."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.files import sha256_file

_DROPPED = "PZC"
"""First letters of the Unicode categories of punctuation, separators and control characters."""


def normalise(text: str) -> str:
    """``text`` without what does not change a prompt: case, width, punctuation, spaces.

    Unicode NFKC and case folding; every run of punctuation, separators and control characters is
    one space. A text of punctuation alone keeps it. Applying it twice changes nothing.
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
    """Distinct texts that two sets share, literally and after :func:`normalise`; sorted."""

    exact: tuple[str, ...]
    normalised: tuple[str, ...]


def overlap(first: Iterable[Prompt], second: Iterable[Prompt]) -> Overlap:
    """What two sets share; the order of the two does not matter."""
    ours, theirs = {p.text for p in first}, {p.text for p in second}
    same = {normalise(text) for text in ours} & {normalise(text) for text in theirs}
    return Overlap(tuple(sorted(ours & theirs)), tuple(sorted(same)))


@dataclass(frozen=True)
class SetSummary:
    """A set in numbers.

    Attributes:
        prompts: how many it has.
        distinct: how many differ after :func:`normalise`.
        words: runs without white space, over all prompts.
        bytes: of the file.
        sha256: of the file.
    """

    prompts: int
    distinct: int
    words: int
    bytes: int
    sha256: str


def summarise(path: Path) -> SetSummary:
    """The numbers of the set at ``path``; raises what :func:`read_prompts` raises."""
    prompts = read_prompts(path)
    return SetSummary(
        prompts=len(prompts),
        distinct=len({normalise(prompt.text) for prompt in prompts}),
        words=sum(len(prompt.text.split()) for prompt in prompts),
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
    )
