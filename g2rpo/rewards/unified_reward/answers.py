"""Parses the scores in an answer, or rejects it; a score is never guessed.

A score is the aspect's name, optionally followed by the word score or rating and the scale in
parentheses, then a colon or equals sign and a number, optionally with the scale's maximum:
``Alignment Score (1-5): 4.5``, ``**style**: 4/5``, ``"coherence_score": 3``. Case, line breaks and
Markdown are ignored. Decimal commas are rejected: ``4,5`` could be two scores.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from g2rpo.rewards.question import ASPECTS

_MARKS = r"[\s*_`#\"']{0,16}"
_STATEMENT = re.compile(
    rf"""(?<![^\W_]|-)(?P<aspect>alignment|coherence|style)(?![^\W_])
    {_MARKS}(?:(?P<word>score|rating)(?![^\W_]){_MARKS})?
    (?:\((?P<scale>[^()\n]{{0,24}})\){_MARKS})?
    [:=]{_MARKS}""",
    re.IGNORECASE | re.VERBOSE,
)
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
# A number must be followed by the end of a line, sentence or list element, or by the next aspect. A
# digit after a comma, point or dash would make it another number or a range.
_VALUE = re.compile(
    rf"""(?P<value>[-+]?{_NUMBER})
    (?:\s{{0,4}}\(?\s{{0,4}}(?:/|out\s+of)\s{{0,4}}(?P<top>{_NUMBER})\)?)?
    (?=[ \t*_`"']{{0,16}}(?:\Z|[\r\n]|[,;.](?!\s?[0-9])|[(\[)\]}}|<]|alignment|coherence|style)
      |[ \t]+[-–—](?!\s*[0-9]))""",
    re.IGNORECASE | re.VERBOSE,
)
_STARTS_LIKE_A_NUMBER = re.compile(r"[-+]?\.?[0-9]")
_NO_NUMBER = re.compile(r"[-+]?(?:nan|inf|infinity|n/a|none|null|unknown)(?![^\W_])", re.IGNORECASE)


class MalformedAnswerError(ValueError):
    """An answer does not state the scores; says why."""


class Scores(NamedTuple):
    """The three scores of an answer, on the template's scale."""

    alignment: float
    coherence: float
    style: float


def read_scores(answer: str, low: float, high: float) -> Scores:
    """The scores in ``answer``, each in [low, high].

    Raises:
        MalformedAnswerError: a score is missing, not a number, out of range or on another scale,
            or an aspect has two different scores.
    """
    found: dict[str, float] = {}
    for aspect, value in _statements(answer, low, high):
        if not low <= value <= high:
            raise MalformedAnswerError(f"{aspect} {value:g} is outside {low:g} to {high:g}")
        if found.setdefault(aspect, value) != value:
            raise MalformedAnswerError(f"{aspect} is both {found[aspect]:g} and {value:g}")
    missing = [aspect for aspect in ASPECTS if aspect not in found]
    if missing:
        raise MalformedAnswerError(f"no score for {' and '.join(missing)}")
    return Scores(**found)


def well_formed(answer: str, low: float, high: float) -> bool:
    """Whether :func:`read_scores` accepts ``answer``."""
    try:
        read_scores(answer, low, high)
    except MalformedAnswerError:
        return False
    return True


def _statements(answer: str, low: float, high: float) -> Iterator[tuple[str, float]]:
    """Each (aspect, number) in ``answer``, in order."""
    for statement in _STATEMENT.finditer(answer):
        aspect = statement["aspect"].lower()
        number = _VALUE.match(answer, statement.end())
        if number is None:
            looks = _STARTS_LIKE_A_NUMBER.match(answer, statement.end())
            # "Style: 3D rendering" is prose, "Style Score: 3D" is a malformed score.
            if _NO_NUMBER.match(answer, statement.end()) or (looks and statement["word"]):
                raise MalformedAnswerError(f"the score for {aspect} is not a plain number")
            continue
        scale = [float(bound) for bound in re.findall(_NUMBER, statement["scale"] or "")]
        if scale not in ([], [high], [low, high]):
            raise MalformedAnswerError(f"{aspect} uses the scale ({statement['scale']})")
        if number["top"] is not None and float(number["top"]) != high:
            raise MalformedAnswerError(f"{aspect} is out of {number['top']}, not of {high:g}")
        yield aspect, float(number["value"])
