"""Makes text from users (styles, prompts, labels, file names) safe to display."""

import re
from collections import Counter
from typing import Any

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, bidirectional overrides, lone surrogates."""


def is_unicode(text: str) -> bool:
    """Whether ``text`` has no lone surrogates, as JSON and file names may."""
    return re.search("[\ud800-\udfff]", text) is None


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The ``object_pairs_hook`` of :func:`json.loads` that refuses equal keys.

    Raises:
        ValueError: a key occurs twice, of which Python would take the last.
    """
    for key, count in Counter(key for key, _ in pairs).most_common(1):
        if count > 1:
            raise ValueError(f"duplicate key {key!r}")
    return dict(pairs)


def visible(text: str) -> str:
    """``text`` on one line: white space as spaces, other control characters as escapes.

    Escape sequences then cannot colour or clear a terminal, nor bidirectional overrides reorder
    adjacent text.
    """
    return CONTROLS.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    character = match[0]
    return " " if character.isspace() else character.encode("unicode_escape").decode()


def plain_value(value: Any) -> Any:
    """A template's value, made :func:`visible` if it is plain text."""
    return visible(value) if type(value) is str else value


def csv_text(text: str) -> str:
    """``text`` for a CSV cell: :func:`visible`, and never a spreadsheet formula.

    Text that starts like a formula is prefixed with an apostrophe; numbers are kept.
    """
    if not text.startswith(tuple("=+-@\t\r\n＝＋－＠")):
        return visible(text)
    try:
        float(text)
    except ValueError:
        return f"'{visible(text)}"
    return text


def excerpt(text: str, limit: int = 200) -> str:
    """The end of ``text``, where causes are, as one line of at most ``limit`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else "…" + line[1 - limit :]
