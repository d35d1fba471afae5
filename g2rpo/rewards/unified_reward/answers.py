"""Reading scores out of an answer, or refusing it; a score is never guessed.

An aspect's score is its name, perhaps the word score or rating and the scale in parentheses, a
colon or equals sign, and a number, perhaps with the scale's top: ``Alignment Score (1-5): 4.5``,
``**style**: 4/5``, ``"coherence_score": 3``. Case, line breaks and Markdown do not matter. A
decimal comma is refused: ``4,5`` may as well be two scores.
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
# After a number the line ends, or a sentence, a list's element or the next aspect begins; a digit
# behind a comma, point or dash would make it another number or a range.
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
    """An answer does not hold the scores; says why."""


class Scores(NamedTuple):
    """The three scores of an answer, each within the template's scale."""

    alignment: float
    coherence: float
    style: float


def read_scores(answer: str, low: float, high: float) -> Scores:
    """The scores that ``answer`` states, each in [low, high].

    Raises:
        MalformedAnswerError: a score is missing, not a number, out of range or on another scale,
            or an aspect has two different ones.
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
    """Each aspect and number that ``answer`` states, in order."""
    for statement in _STATEMENT.finditer(answer):
        aspect = statement["aspect"].lower()
        number = _VALUE.match(answer, statement.end())
        if number is None:
            looks = _STARTS_LIKE_A_NUMBER.match(answer, statement.end())
            # "Style: 3D rendering" is prose, "Style Score: 3D" is a score that cannot be read.
            if _NO_NUMBER.match(answer, statement.end()) or (looks and statement["word"]):
                raise MalformedAnswerError(f"the score for {aspect} is not a plain number")
            continue
        scale = [float(bound) for bound in re.findall(_NUMBER, statement["scale"] or "")]
        if scale not in ([], [high], [low, high]):
            raise MalformedAnswerError(f"{aspect} is on the scale ({statement['scale']})")
        if number["top"] is not None and float(number["top"]) != high:
            raise MalformedAnswerError(f"{aspect} is out of {number['top']}, not of {high:g}")
        yield aspect, float(number["value"])


def excerpt(text: str, limit: int = 200) -> str:
    """The end of ``text``, where scores stand, in one line of at most ``limit`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else "…" + line[1 - limit :]
