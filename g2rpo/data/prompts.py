"""Prompt sets, and the prompts of each training iteration.

A set is a ``.txt`` file with one prompt per line, or a table (:mod:`g2rpo.data.tables`) with a
column ``prompt`` and optionally ``id`` and ``style``. A ``.json`` or ``.yaml`` table may also be a
list of prompts, or a mapping of ids to prompts.
"""

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from g2rpo.data.tables import PROMPT_COLUMNS, SUFFIXES, Row, read_table, read_text
from g2rpo.errors import UserError
from g2rpo.files import atomic_write_text
from g2rpo.seeds import permutation
from g2rpo.text import is_unicode

FIELDS = ("prompt", "id", "style")
HEADER = {*PROMPT_COLUMNS, *FIELDS, "image", "file_name", "prompt_id", "category"}
"""A line with two of these words is the header of a table."""
LONGEST_ID = 200
"""Maximum bytes of an id, which becomes part of file names."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the id that seeds its noise and labels its scores.

    Attributes:
        id: the id in the set, else the prompt's number in its file, from 0, padded to six digits.
        text: the prompt.
        style: the prompt's style, if its set has styles.
    """

    id: str
    text: str
    style: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file; ``note`` names the column that was read unless it is obvious."""

    prompts: list[Prompt]
    note: str = ""


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a set, or only the first ``limit``.

    Raises:
        UserError: see :func:`read_prompt_set`.
    """
    prompts = read_prompt_set(path).prompts
    return prompts if limit is None else prompts[:limit]


def read_prompt_set(path: Path) -> PromptSet:
    """Reads a set in the format of its suffix.

    Raises:
        UserError: the file is missing, of another format, not UTF-8, empty or malformed, or has an
            empty prompt, or an empty, duplicate or invalid id; names the line.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file with one prompt per line")
    if not path.exists():
        raise UserError(
            f"{path}: no such prompt file; run `g2rpo prompts fetch` for the published ones"
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
            note = f"{path.name}: reading prompts from {column!r}{others}"
    else:
        raise UserError(
            f"{path}: {f'unknown suffix {suffix}' if suffix else 'no suffix'}; save the prompts as "
            f".txt (one per line), {', '.join(SUFFIXES)}"
        )
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    for row in rows:
        prompt = _prompt(path, row, column, len(prompts))
        if prompt.id in places:
            raise UserError(
                f"{path}, {row.place}: duplicate id {prompt.id!r}, also in {places[prompt.id]}; "
                "ids must be unique"
            )
        places[prompt.id] = row.place
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path}: no prompts; write one per line")
    return PromptSet(prompts, note)


def _txt_rows(path: Path, text: str) -> list[Row]:
    # Not splitlines(): it also splits at characters in prompts, e.g. U+2028.
    lines = re.split(r"\r*\n|\r", text)
    if not lines[-1]:
        lines.pop()
    other = _looks_like(lines)
    if other is not None:
        raise UserError(f"{path}: {other}; a .txt file must have one prompt per line")
    return [Row(f"line {number}", {"prompt": line}) for number, line in enumerate(lines, start=1)]


def _looks_like(lines: Sequence[str]) -> str | None:
    """What the lines of a .txt file seem to be instead of prompts, or None."""
    head, second = ([line.strip() for line in lines[:2]] + ["", ""])[:2]
    cells = [cell.strip(' "').casefold() for cell in re.split("[,;|]", head)]
    words = set(cells) & HEADER
    is_header = len(words) > 1 or words & set(PROMPT_COLUMNS[: 2 if len(cells) > 1 else None])
    if any("\0" in line for line in lines):
        return "it has NUL characters: not text, or UTF-16 without a byte-order mark"
    if 2 * sum("\t" in line for line in lines) > len(lines):
        return "most lines have tabs; rename it to .tsv if it is a table"
    # Unlike "[photo] a cat", which is a prompt.
    if re.match(r"\[\s*([\"'{]|$|[^][]*,[^][]*\]$)|\{\s*([\"']|$|[^{}]*:[^{}]*\}$)", head):
        return "it looks like JSON; rename it to .json, or .jsonl if each line is an object"
    if second and is_header:
        return f"its first line {head!r} is the header of a table; rename it to .csv"
    bulleted = [line.startswith("- ") for line in lines]
    if all(bulleted[1:]) and bulleted[-1:] == [True] and (bulleted[0] or head.endswith(":")):
        return "it looks like YAML; rename it to .yaml"
    return None


def _check_spelling(path: Path, columns: Collection[str]) -> None:
    """Rejects columns that look like misspelt known ones; others are ignored."""
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
            raise UserError(f"{place}: {key} must be a string; put it in quotes")
    if values and column not in values:
        raise UserError(f"{place}: no {column!r}; found {', '.join(map(repr, values))}")
    text = values.get(column, "").strip()
    if not text:
        raise UserError(f"{place}: empty prompt; remove the line")
    if not is_unicode(text):
        raise UserError(f"{place}: the prompt is not valid Unicode (a lone surrogate)")
    identity = values.get("id", f"{number:06d}").strip()
    problem = id_problem(identity)
    if problem is not None:
        raise UserError(f"{place}: the id {identity!r} {problem}")
    return Prompt(identity, text, (values.get("style") or "").strip() or None)


def id_problem(identity: str) -> str | None:
    """Why an id is not valid in file names, or None."""
    if not identity:
        return "is empty; set it for every prompt, or remove the column"
    if identity.startswith(".") or any(c in "/\\" or not c.isprintable() for c in identity):
        return "is not a valid file name; remove slashes, control characters and a leading dot"
    if len(identity.encode("utf-8", "surrogatepass")) > LONGEST_ID:
        return f"is longer than {LONGEST_ID} bytes; shorten it"
    return None


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """Writes a ``.txt`` set, one prompt per line, atomically.

    Raises:
        UserError: these prompts cannot be read back as they are.
    """
    for text in texts:
        if "\n" in text or "\r" in text:
            raise UserError(f"{path}: a prompt has a line break: {text!r}")
    other = _looks_like(texts)
    if other is not None:
        raise UserError(f"{path}: could not be read back ({other})")
    atomic_write_text(path, "".join(text + "\n" for text in texts))


def prompts_of_iteration(
    prompts: Sequence[Prompt], count: int, seed: int, iteration: int
) -> list[Prompt]:
    """The ``count`` prompts of ``iteration`` (from 0), over all ranks.

    Each epoch is a permutation of the set, a function of (seed, epoch). An incomplete last
    iteration is dropped, so that the prompts of an iteration are distinct.

    Raises:
        UserError: the set has fewer than ``count`` prompts.
    """
    per_epoch = len(prompts) // count
    if per_epoch == 0:
        raise UserError(
            f"rollout.prompts_per_iteration is {count}, but the prompt set has only "
            f"{len(prompts)}; lower it or add prompts"
        )
    epoch, position = divmod(iteration, per_epoch)
    order = permutation(len(prompts), seed, "prompt-order", epoch)
    return [prompts[index] for index in order[position * count : (position + 1) * count]]
