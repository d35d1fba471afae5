"""Reads tables of text with line numbers: prompt sets, manifests and raters' answers.

The format follows from the suffix: ``.csv``, ``.tsv``, ``.json``, ``.jsonl`` (``.ndjson``) or
``.yaml`` (``.yml``). Text is UTF-8, or UTF-16 and UTF-32 with a byte-order mark. Column names
ignore case and surrounding spaces. The delimiter of a ``.csv`` or ``.tsv`` is the comma, semicolon,
tab or bar for which the header has the most known names. YAML scalars are kept as text.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import normalize

from g2rpo.errors import UserError
from g2rpo.text import without_repeats
from g2rpo.yaml_text import parse_yaml

Value = TypeVar("Value")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".yaml", ".yml")
"""Suffixes of tables."""
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")
"""Names of the prompt column; the first one that a file has is read."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is a prefix
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class Row:
    """A row: its values by column, and its place, e.g. ``line 3``."""

    place: str
    values: Mapping[str, Any]

    @property
    def is_blank(self) -> bool:
        """Whether all values are empty; spreadsheets write such rows."""
        return all(isinstance(text, str) and not text.strip() for text in self.values.values())


@dataclass(frozen=True)
class Table:
    """The rows of ``path``, all their columns, and the file's format, for messages."""

    path: Path
    columns: tuple[str, ...]
    rows: list[Row]
    form: str

    def column(self, names: Sequence[str]) -> str:
        """The first of ``names``, which are synonyms, that the table has.

        Raises:
            UserError: it has none, or two of them differ in a row.
        """
        present = [name for name in names if name in self.columns]
        if not present:
            if not self.columns:
                raise UserError(f"{self.path}: the file is empty; it needs a column {names[0]!r}")
            found = ", ".join(map(repr, self.columns))
            raise UserError(
                f"{self.path}: no column {names[0]!r}; found {found} ({self.form}); rename a "
                f"column to {names[0]!r}"
            )
        for other in present[1:]:
            for row in self.rows:
                one, two = row.values.get(present[0]), row.values.get(other)
                if one is not None and two is not None and str(one).strip() != str(two).strip():
                    raise UserError(
                        f"{self.path}, {row.place}: the columns {present[0]!r} and {other!r} "
                        "differ; remove or rename one of them"
                    )
        return present[0]

    def not_read(self, read: Collection[str]) -> str:
        """Names the columns not in ``read``; empty if there are none."""
        others = [repr(name) for name in self.columns if name not in read]
        return f"; ignoring {', '.join(others)}" if others else ""


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it cannot be read, or is not UTF-8, or UTF-16 or UTF-32 with a byte-order mark.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and data.count(0) * 4 > len(data):
        raise UserError(
            f"{path}: not UTF-8 text (it looks like UTF-16 without a byte-order mark); "
            "save it as UTF-8"
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        name = encoding.removesuffix("-sig").upper()
        raise UserError(
            f"{path}, line {line}: not {name} text{_guess(data)}; save it as UTF-8"
        ) from None


def _guess(data: bytes) -> str:
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return ""
    return " (it may be Windows-1252 or Latin-1)"


def by_name(named: Mapping[str, Value]) -> Callable[[str], Value | None]:
    """Looks names up exactly, else by their NFC form if it is unique.

    File names from macOS are decomposed (NFD), others mostly composed (NFC).
    """
    composed: dict[str, list[Value]] = {}
    for name, value in named.items():
        composed.setdefault(normalize("NFC", name), []).append(value)

    def find(name: str) -> Value | None:
        if name in named:
            return named[name]
        alike = composed.get(normalize("NFC", name), [])
        return alike[0] if len(alike) == 1 else None

    return find


def read_table(
    path: Path,
    known: Collection[str],
    bare: str | None = None,
    malformed: list[tuple[str, str]] | None = None,
) -> Table:
    """Reads a table.

    Args:
        path: the file; read as CSV unless its suffix is another one of :data:`SUFFIXES`.
        known: columns that identify the header of a CSV file.
        bare: the column for JSON and YAML entries that are plain strings. If given, a mapping of
            ids to entries is also a table, as is a list under the name of a prompt column.
        malformed: if given, gets the place of each row that cannot be read, and why, with the file.

    Raises:
        UserError: the file cannot be read, or a row if not ``malformed``; names the line.
    """
    text, suffix = read_text(path), path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _of_entries(path, _json_lines(path, text, malformed), (), bare, malformed)
    if suffix == ".json":
        return _document(path, _json_value(path, text), bare, malformed)
    if suffix in (".yaml", ".yml"):
        return _document(path, _yaml_value(path, text), bare, malformed)
    return _separated(path, text, known, malformed)


_Malformed = list[tuple[str, str]] | None


def _refuse(path: Path, place: str, reason: str, malformed: _Malformed) -> None:
    if malformed is None:
        raise UserError(f"{path}, {place}: {reason}")
    malformed.append((place, f"{path.name}, {place}: {reason}"))


def _name(column: object) -> str:
    return str(column).strip().casefold()


def _separated(path: Path, text: str, known: Collection[str], malformed: _Malformed) -> Table:
    if 0 < text.count("\r\r\n") == text.count("\n"):  # newlines were converted twice
        text = text.replace("\r\r\n", "\n")
    marks = "\t,;|" if path.suffix.lower() == ".tsv" else ",;\t|"
    head = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]

    def names_known(mark: str) -> int:
        return len({_name(cell.strip(' "')) for cell in head.split(mark)} & set(known))

    stated = re.fullmatch(r"sep=(.)", head.rstrip(), re.IGNORECASE)  # for spreadsheets
    mark = stated[1] if stated else max(marks, key=names_known)  # the first of several
    lines = _cells(path, text, mark)
    filled = (cells for _, cells in lines if any(cell.strip() for cell in cells))
    if stated:
        next(filled)
    columns = [_name(cell) for cell in next(filled, [])]
    while columns and not columns[-1]:
        columns.pop()
    twice = [name for name in columns if name and columns.count(name) > 1]
    if twice:
        raise UserError(f"{path}, line 1: duplicate column {twice[0]!r}")
    form = f"separated by {mark!r}"
    if not set(columns) & set(known):  # no header
        return Table(path, tuple(filter(None, columns)), [], form)
    rows = []
    for line, given in lines:
        # Spreadsheets also write trailing delimiters, and rows of nothing else.
        more = any(cell.strip() for cell in given[len(columns) :])
        cells = given if more else given[: len(columns)]
        if not any(cell.strip() for cell in cells):
            cells = [""] * len(columns)
        if len(cells) != len(columns):
            hint = f"; put text with {mark!r} in double quotes" if more else ""
            counts = f"{len(cells)} values, but the header has {len(columns)}"
            _refuse(path, f"line {line}", counts + hint, malformed)
            continue
        values = dict(zip(columns, cells, strict=True))
        values.pop("", None)  # an unnamed index column
        rows.append(Row(f"line {line}", values))
    return Table(path, tuple(filter(None, columns)), rows, form)


def _cells(path: Path, text: str, mark: str) -> Iterator[tuple[int, list[str]]]:
    """The number of the last line and the cells of each row."""
    lines = re.split(r"\r\n|\r|\n", re.sub(r"[\r\n]+$", "", text))
    counts = {line.count(mark) for line in lines if line.strip()}
    if mark == "\t" and len(counts) == 1 and counts != {0}:
        # Published lists are not quoted: quotation marks are text, unless they enclose a cell.
        for number, line in enumerate(lines, start=1):
            yield number, [_unquoted(cell) for cell in line.split(mark)]
        return
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True, strict=True
    )
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None


def _unquoted(cell: str) -> str:
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"') if quoted else cell


def _json_lines(path: Path, text: str, malformed: _Malformed) -> list[tuple[str, Any]]:
    lines = re.split(r"\r*\n|\r", text)  # not splitlines(): prompts may contain U+2028
    while lines and not lines[-1].strip():
        lines.pop()
    found = []
    for number, line in enumerate(lines, start=1):
        place = f"line {number}"
        try:
            found.append((place, _json_value(path, line, number) if line.strip() else {}))
        except UserError as error:
            _refuse(path, place, str(error).removeprefix(f"{path}, {place}: "), malformed)
    return found


def _json_value(path: Path, text: str, line: int | None = None) -> Any:
    place = "" if line is None else f", line {line}"
    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        place = place or f", line {error.lineno}"
        hint = "; each line must be a complete object"
        if line is None:
            hint = (
                "; rename it to .jsonl if each line is an object"
                if error.msg == "Extra data"
                else ""
            )
        raise UserError(f"{path}{place}: not valid JSON ({error.msg}{hint})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}{place}: not valid JSON ({error})") from None


def _yaml_value(path: Path, text: str) -> Any:
    try:
        return parse_yaml(text, as_text=True)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


def _document(path: Path, value: Any, bare: str | None, malformed: _Malformed) -> Table:
    """A list of entries or, with ``bare``, a mapping of ids to entries or a mapping with a list."""
    beside: list[str] = []
    if isinstance(value, dict) and bare is not None:
        named = {_name(key): key for key in value}
        columns = [name for name in PROMPT_COLUMNS if name in named]
        if len(columns) == 1 and isinstance(value[named[columns[0]]], (list, dict)):
            beside = [name for name in named if name not in columns]
            value = value[named[columns[0]]]
        elif columns:
            raise UserError(
                f"{path}: key {columns[-1]!r} outside of a list; write a list of prompts or "
                "rows, or a mapping of ids to prompts"
            )
    if isinstance(value, list):
        places = [(f"entry {number}", entry) for number, entry in enumerate(value, start=1)]
    elif isinstance(value, dict) and bare is not None:
        places = [
            (f"entry {key!r}", {"id": key} | (entry if isinstance(entry, dict) else {bare: entry}))
            for key, entry in value.items()
        ]
    else:
        found = {dict: "an object", str: "text", type(None): "nothing"}.get(type(value), "a number")
        raise UserError(f"{path}: expected a list of rows, found {found}")
    return _of_entries(path, places, beside, bare, malformed)


def _of_entries(
    path: Path,
    entries: Sequence[tuple[str, Any]],
    beside: Sequence[str],
    bare: str | None,
    malformed: _Malformed,
) -> Table:
    columns, rows = dict.fromkeys(beside), []
    for place, given in entries:
        entry = {bare: given} if bare is not None and isinstance(given, str) else given
        if not isinstance(entry, dict):
            _refuse(path, place, 'expected an object, {"prompt": "..."}', malformed)
            continue
        values = {_name(key): value for key, value in entry.items()}
        if len(values) < len(entry):
            _refuse(path, place, "two keys differ only in case or spaces", malformed)
            continue
        columns |= dict.fromkeys(values)
        rows.append(Row(place, values))
    form = path.suffix.lower().removeprefix(".")
    if form in ("yaml", "yml"):
        form += "; put text with ': ' in quotes"
    return Table(path, tuple(columns), rows, form)
