"""Prompt sets, and which prompts an iteration trains on.

A set is a file: ``.txt`` with one prompt per line, or a table (:mod:`g2rpo.data.tables`) with a
column ``prompt``, which may give each prompt an ``id`` and a ``style``; a ``.json`` or ``.yaml``
table may also be a list of prompts, or a mapping of ids to prompts.
"""

import csv
import difflib
import io
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from g2rpo.data.tables import PROMPT_COLUMNS, SUFFIXES, Row, is_unicode, read_table, read_text
from g2rpo.errors import UserError
from g2rpo.files import atomic_write_text
from g2rpo.seeds import permutation

FIELDS = ("prompt", "id", "style")
HEADER = {*PROMPT_COLUMNS, *FIELDS, "image", "file_name", "prompt_id", "category"}
"""Words of which a line that has two is the header of a table."""
LONGEST_ID = 200
"""Bytes of an id: it becomes part of a file's name."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and the id that names its noise and its scores.

    Attributes:
        id: the set's own id, else the prompt's number in its file, counted from 0, padded to six
            digits.
        text: the prompt.
        style: the prompt's style, where its set has styles.
    """

    id: str
    text: str
    style: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file; ``note`` says which column was read where that is not plain."""

    prompts: list[Prompt]
    note: str = ""


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a set; ``limit`` keeps the first ones.

    Raises:
        UserError: what :func:`read_prompt_set` raises.
    """
    prompts = read_prompt_set(path).prompts
    return prompts if limit is None else prompts[:limit]


def read_prompt_set(path: Path) -> PromptSet:
    """Reads a set in the format of its suffix: ``.txt``, or that of a table.

    Raises:
        UserError: the file is missing, of another suffix, not UTF-8, empty, or malformed, or has
            an empty prompt, an empty, repeated or unusable id; the place is named.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file with one prompt per line")
    if not path.exists():
        raise UserError(
            f"{path}: no such prompt file; `g2rpo prompts fetch` gets the published ones"
        )
    suffix, note = path.suffix.lower(), ""
    if suffix == ".txt":
        column, rows = "prompt", _txt_rows(path, read_text(path))
    elif suffix in SUFFIXES:
        table = read_table(path, FIELDS + PROMPT_COLUMNS, bare="prompt")
        _check_spelling(path, table.columns)
        column, rows = table.column(PROMPT_COLUMNS), table.rows
        others = table.not_read((column, "id", "style"))
        if others or column != "prompt":
            note = f"{path.name}: prompts are read from {column!r}{others}"
    else:
        raise UserError(
            f"{path}: the suffix of a prompt list says its format, and {suffix or 'none'} is not "
            f"one; rename it to .txt (one prompt per line), {', '.join(SUFFIXES)}"
        )
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    for row in rows:
        prompt = _prompt(path, row, column, len(prompts))
        if prompt.id in places:
            raise UserError(
                f"{path}, {row.place}: the id {prompt.id!r} is that of {places[prompt.id]} too; "
                "ids must be unique"
            )
        places[prompt.id] = row.place
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path}: no prompts; write one per line")
    return PromptSet(prompts, note)


def _txt_rows(path: Path, text: str) -> list[Row]:
    # Not splitlines(): it also breaks at characters that a prompt may hold, e.g. U+2028.
    lines = re.split(r"\r*\n|\r", text)
    if not lines[-1]:
        lines.pop()
    other = _looks_like(lines)
    if other is not None:
        raise UserError(f"{path}: {other}; a .txt set has one prompt per line")
    return [Row(f"line {number}", {"prompt": line}) for number, line in enumerate(lines, start=1)]


def _looks_like(lines: Sequence[str]) -> str | None:
    """What the lines of a .txt file seem to be instead of prompts; None where they may be."""
    head, second = ([line.strip() for line in lines[:2]] + ["", ""])[:2]
    cells = [cell.strip(' "').casefold() for cell in re.split("[,;|]", head)]
    words = set(cells) & HEADER
    is_header = len(words) > 1 or words & set(PROMPT_COLUMNS[: 2 if len(cells) > 1 else None])
    if any("\0" in line for line in lines):
        return "it holds NUL characters, so it is no text, or UTF-16 without a byte-order mark"
    if 2 * sum("\t" in line for line in lines) > len(lines):
        return "most lines have tabs; name it .tsv if it is a table"
    # Unlike "[photo] a cat", which is a prompt.
    if re.match(r"\[\s*([\"'{]|$|[^][]*,[^][]*\]$)|\{\s*([\"']|$|[^{}]*:[^{}]*\}$)", head):
        return "it starts as JSON does; name it .json, or .jsonl if each line is an object"
    if second and is_header:
        return f"its first line {head!r} is the header of a table; name it .csv"
    bulleted = [line.startswith("- ") for line in lines]
    if all(bulleted[1:]) and bulleted[-1:] == [True] and (bulleted[0] or head.endswith(":")):
        return "it is written as YAML; name it .yaml"
    return None


def _check_spelling(path: Path, columns: Collection[str]) -> None:
    """Other columns are not read; one that seems to be a misspelt one of ours is refused."""
    for name in columns:
        for ours in FIELDS:
            alike = difflib.SequenceMatcher(None, name, ours).ratio()
            if ours not in columns and (
                (alike > 0.8 and name not in PROMPT_COLUMNS) or sorted(name) == sorted(ours)
            ):
                raise UserError(
                    f"{path}: unknown column {name!r}; did you mean {ours!r}? Rename or remove it"
                )


def _prompt(path: Path, row: Row, column: str, number: int) -> Prompt:
    place, values = f"{path}, {row.place}", row.values
    for key in (column, "id", "style"):
        absent = key not in values or (values[key] is None and key == "style")
        if not absent and not isinstance(values[key], str):
            raise UserError(f"{place}: {key} must be a string; write it in quotes")
    if values and column not in values:
        raise UserError(f"{place}: no {column!r}; found {', '.join(map(repr, values))}")
    text = values.get(column, "").strip()
    if not text:
        raise UserError(f"{place}: empty prompt; remove the line")
    if not is_unicode(text):
        raise UserError(f"{place}: the prompt is not valid Unicode (half of a surrogate pair)")
    identity = values.get("id", f"{number:06d}").strip()
    problem = id_problem(identity)
    if problem is not None:
        raise UserError(f"{place}: the id {identity!r} {problem}")
    return Prompt(identity, text, (values.get("style") or "").strip() or None)


def id_problem(identity: str) -> str | None:
    """Why an id cannot be part of a file's name, or None."""
    if not identity:
        return "is empty; give every prompt one, or leave the column out"
    if identity.startswith(".") or any(c in "/\\" or not c.isprintable() for c in identity):
        return "cannot name a file; use no slashes or control characters, and no dot in front"
    if len(identity.encode("utf-8", "surrogatepass")) > LONGEST_ID:
        return f"is longer than {LONGEST_ID} bytes, too long for a file's name"
    return None


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Writes a set in the format of the name of ``path``, atomically.

    Raises:
        UserError: a ``.txt`` set cannot hold a prompt with a line break, or these prompts.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        lines = [
            json.dumps(
                {"prompt": p.text, "id": p.id} | ({"style": p.style} if p.style else {}),
                ensure_ascii=False,
            )
            for p in prompts
        ]
        atomic_write_text(path, "".join(line + "\n" for line in lines))
    elif suffix == ".csv":
        table = io.StringIO(newline="")
        # All quoted: a carriage return inside a prompt is not quoted otherwise.
        writer = csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(FIELDS)
        writer.writerows((p.text, p.id, p.style or "") for p in prompts)
        atomic_write_text(path, table.getvalue())
    else:
        for prompt in prompts:
            if "\n" in prompt.text or "\r" in prompt.text:
                raise UserError(f"{path}: prompt {prompt.id} has a line break; write .jsonl")
        other = _looks_like([prompt.text for prompt in prompts])
        if other is not None:
            raise UserError(f"{path}: could not be read again ({other}); or write .jsonl")
        atomic_write_text(path, "".join(prompt.text + "\n" for prompt in prompts))


def prompts_of_iteration(
    prompts: Sequence[Prompt], count: int, seed: int, iteration: int
) -> list[Prompt]:
    """The ``count`` prompts of ``iteration`` (counted from 0), over all ranks.

    Each epoch is a permutation of the set drawn from (seed, epoch) alone; what does not fill an
    iteration at its end is left out, so that the prompts of an iteration are distinct.

    Raises:
        UserError: the set has fewer than ``count`` prompts.
    """
    per_epoch = len(prompts) // count
    if per_epoch == 0:
        raise UserError(
            f"training.prompts_per_iteration is {count} but the prompt set has {len(prompts)}: "
            "lower it or give more prompts"
        )
    epoch, position = divmod(iteration, per_epoch)
    order = permutation(len(prompts), seed, "prompt-order", epoch)
    return [prompts[index] for index in order[position * count : (position + 1) * count]]
