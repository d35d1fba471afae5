"""Output and errors under a locale whose encoding lacks characters."""

import io
import sys
from codecs import backslashreplace_errors, register_error

ADVICE = "set LC_ALL=C.UTF-8, or another UTF-8 locale, and unset PYTHONUTF8 and PYTHONIOENCODING"
_escaped = False


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Writes undecodable file names as their bytes, and escapes other characters."""
    global _escaped  # noqa: PLW0603 - codecs error handlers have no other state
    if not isinstance(error, UnicodeEncodeError):
        raise error
    code = ord(error.object[error.start])
    if 0xDC80 <= code <= 0xDCFF:
        return bytes([code - 0xDC00]), error.start + 1
    _escaped = True
    return backslashreplace_errors(error)


def escape_output() -> None:
    """Makes standard output escape characters that its encoding lacks."""
    register_error("g2rpo", _escape)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="g2rpo")


def output_note() -> str:
    """One line if characters were escaped, else empty."""
    if not _escaped:
        return ""
    encoding = sys.stdout.encoding
    return f"the locale's encoding, {encoding}, lacks characters, shown as \\x..: {ADVICE}"


def locale_note(*texts: str) -> str:
    """What to add to an error about ``texts`` if the locale may be the cause, else empty."""
    encoding = sys.getfilesystemencoding()
    if encoding.startswith("utf") or all(text.isascii() for text in texts):
        return ""
    return f"; the locale's encoding, {encoding}, lacks characters: {ADVICE}"


def explain(error: UnicodeError) -> str | None:
    """The message for an encoding error; None if the locale is not the cause."""
    note = locale_note("\u00e9")
    if not note or not isinstance(error, (UnicodeEncodeError, UnicodeDecodeError)):
        return None
    part = error.object[max(0, error.start - 60) : error.end + 20]
    return f"{part!a} cannot be written or read{note}"
