"""Text that comes from users (styles, prompts, labels, file names), safe for what shows it."""

import re
from typing import Any

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, overrides of the direction of writing, half characters."""


def visible(text: str) -> str:
    """``text`` on one line: white space as blanks, other control characters as escapes.

    An escape sequence cannot colour or clear a terminal then, nor an override of the direction
    turn round what stands beside it.
    """
    return CONTROLS.sub(_shown, text)


def _shown(found: re.Match[str]) -> str:
    character = found[0]
    return " " if character.isspace() else character.encode("unicode_escape").decode()


def plain_value(value: Any) -> Any:
    """What a template is given, made :func:`visible` where it is text and not yet marked up."""
    return visible(value) if type(value) is str else value


def csv_text(text: str) -> str:
    """``text`` for a cell of a CSV file: :func:`visible`, and never a formula of a spreadsheet.

    What begins like one gets an apostrophe in front; numbers stay as they are.
    """
    if not text.startswith(tuple("=+-@\t\r\n＝＋－＠")):
        return visible(text)
    try:
        float(text)
    except ValueError:
        return f"'{visible(text)}"
    return text
