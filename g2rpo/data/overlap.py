"""The prompts that two sets share."""

import unicodedata
from collections.abc import Iterable

from g2rpo.data.prompts import Prompt

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


def overlap(
    first: Iterable[Prompt], second: Iterable[Prompt]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The distinct texts in both sets, exactly and after :func:`normalise`; sorted."""
    ours, theirs = {p.text for p in first}, {p.text for p in second}
    same = {normalise(text) for text in ours} & {normalise(text) for text in theirs}
    return tuple(sorted(ours & theirs)), tuple(sorted(same))
