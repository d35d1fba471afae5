"""Prompt sets, and which prompts an iteration trains on.

A set is a file: ``.txt`` with one prompt per line, ``.csv`` with a column ``prompt``, or ``.jsonl``
with an object per line; the latter two may give each prompt an ``id`` and a ``style``.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from g2rpo.errors import UserError
from g2rpo.files import atomic_write_text
from g2rpo.seeds import permutation

FIELDS = ("prompt", "id", "style")
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
class _Row:
    """One prompt as its file gives it; ``line`` counts from 1."""

    line: int
    values: Mapping[str, str | None]


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Reads a ``.txt``, ``.csv`` or ``.jsonl`` set; ``limit`` keeps the first prompts.

    Any other name is read as ``.txt``.

    Raises:
        UserError: the file is missing, not UTF-8, empty, or malformed, or has an empty prompt, an
            empty, repeated or unusable id; the line is named.
    """
    rows = {".csv": _csv_rows, ".jsonl": _jsonl_rows}.get(path.suffix.lower(), _txt_rows)
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    for row in rows(path, _read_text(path)):
        prompt = _prompt(path, row, len(prompts))
        if prompt.id in lines:
            raise UserError(
                f"{path}, line {row.line}: the id {prompt.id!r} is that of line "
                f"{lines[prompt.id]} too; ids must be unique"
            )
        lines[prompt.id] = row.line
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path}: no prompts; write one per line")
    return prompts if limit is None else prompts[:limit]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such prompt file; `g2rpo prompts fetch` gets the published ones"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; name a file with one prompt per line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; name a file with one prompt per line") from None


def _txt_rows(path: Path, text: str) -> Iterator[_Row]:
    del path
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Not splitlines(): it also breaks at characters that a prompt may hold, e.g. U+2028.
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, start=1):
        yield _Row(number, {"prompt": line})


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_fields(path, 1, columns)
        if len(set(columns)) != len(columns):
            raise UserError(f"{path}, line 1: a column is there twice")
        for values in reader:
            if not values:  # csv gives an empty list for a line with nothing on it
                raise UserError(f"{path}, line {reader.line_num}: empty prompt; remove the line")
            if len(values) != len(columns):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(values)} values where the header has "
                    f"{len(columns)}; put prompts with commas in double quotes"
                )
            yield _Row(reader.line_num, dict(zip(columns, values, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None


def _jsonl_rows(path: Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        try:
            value = json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number}: not valid JSON") from None
        if not isinstance(value, dict):
            raise UserError(f'{path}, line {number}: expected an object, {{"prompt": "..."}}')
        _check_fields(path, number, list(value))
        for key, given in value.items():
            if not isinstance(given, str) and not (given is None and key == "style"):
                raise UserError(f"{path}, line {number}: {key} must be a string")
        yield _Row(number, value)


def _check_fields(path: Path, line: int, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in FIELDS]
    if unknown:
        raise UserError(
            f"{path}, line {line}: unknown column {unknown[0]!r}; a prompt set has prompt, and "
            "may have id and style"
        )
    if "prompt" not in names:
        raise UserError(f"{path}, line {line}: no column 'prompt'; a prompt set needs one")


def _prompt(path: Path, row: _Row, number: int) -> Prompt:
    text = (row.values["prompt"] or "").strip()
    if not text:
        raise UserError(f"{path}, line {row.line}: empty prompt; remove the line")
    given = row.values.get("id")
    identity = f"{number:06d}" if given is None else given.strip()
    problem = id_problem(identity)
    if problem is not None:
        raise UserError(f"{path}, line {row.line}: the id {identity!r} {problem}")
    return Prompt(identity, text, (row.values.get("style") or "").strip() or None)


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
        UserError: a ``.txt`` set cannot hold a prompt with a line break.
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
