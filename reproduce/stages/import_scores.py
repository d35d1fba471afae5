"""Imports scores of an external scorer into a folder of scores: ``g2rpo import-scores``."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

import numpy as np
import pandas as pd
import typer

from benchmarks.evaluation.scoring.engine import Ranks, Scorer
from benchmarks.evaluation.scoring.items import IMAGE_COLUMNS, Item, Source, refuse_bad
from g2rpo.data.tables import Row, Table, by_name, read_table
from g2rpo.errors import UserError
from g2rpo.files import sha256_file
from g2rpo.text import visible
from reproduce.stages.score_folder import (
    Request,
    earlier_scores,
    read_items,
    still_valid,
    write_scores,
    writing_alone,
)

NAMES = (*IMAGE_COLUMNS, "filename", "image_path", "path", "id")
"""Columns that name an image; the first one that a file has is read."""
SCORES = ("score", "correct")
TRUTH = {"true": 1.0, "false": 0.0}
"""Spellings of a boolean score, e.g. GenEval's ``correct``, in a CSV."""
LARGEST = float(np.finfo(np.float32).max)
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Outside:
    """A file of outside scores, a table with one row per image."""

    file: Path
    reward: str
    """What the scores are called."""
    version: str
    """The version of the scorer."""
    column: str | None = None
    """The column of the scores; None for the first of :data:`SCORES`."""


def import_scores(outside: Outside, request: Request) -> pd.DataFrame:
    """Adds the scores in a file to ``request.output`` as ``g2rpo score`` writes it.

    The SHA-256 of the file stands for the hash of weights. Scores of other rewards are kept.

    Raises:
        UserError: an image has no score, or more than one, or one that is not finite, and
            images are not skipped; a row belongs to no image; or scores would be lost.
    """
    wanted = SCORES if outside.column is None else (outside.column.strip().casefold(),)
    malformed: list[tuple[str, str]] = []
    table = read_table(outside.file, (*NAMES, *wanted), malformed=malformed)
    name, column = _first(table, NAMES), _first(table, wanted)
    typer.echo(
        visible(f"{outside.file.name}: reading images from {name!r} and scores from {column!r}")
    )
    source = read_items(request, Ranks())
    for place, reason in malformed:
        source.refuse(place, reason)
    found = _matched(table, name, column, source)
    refuse_bad(source, request.skip_bad, "imported", noun="score")
    _check_replaceable(earlier_scores(request.output), outside, request.output, found)
    scorer = Scorer(request.output / "journal", source.items, skip_bad=request.skip_bad)
    values = np.array([found[item.id] for item in scorer.items], dtype=np.float64)
    sha256 = sha256_file(outside.file)
    scores = scorer.rows(outside.reward, (outside.version, sha256, None), scorer.items, values)
    settings = {
        outside.reward: {
            "imported": outside.file.name,
            "sha256": sha256,
            "version": outside.version,
            "column": column,
        }
    }
    with writing_alone(request.output):  # another command may have added scores meanwhile
        old = earlier_scores(request.output)
        _check_replaceable(old, outside, request.output, found)
        kept, dropped = still_valid(old, scores)
        if dropped:
            raise UserError(
                f"{request.output}: has scores of {', '.join(dropped)} for other images or "
                "prompts; choose another --output"
            )
        scores = pd.concat([*kept, scores], ignore_index=True)
        write_scores(request, settings, source, scorer, scores)
    return scores


def _first(table: Table, names: Sequence[str]) -> str:
    """The first of ``names`` that the table has."""
    return next((name for name in names if name in table.columns), None) or table.column(names)


def _check_replaceable(
    old: pd.DataFrame | None, outside: Outside, output: Path, found: Collection[str]
) -> None:
    """Refuses to lose earlier scores of the reward: of another version, or of other images."""
    if old is None:
        return
    own = old[old["reward"] == outside.reward]
    lost = own[(own["version"] != outside.version) | ~own["id"].isin(found)]
    if len(lost):
        first = lost.iloc[0]
        raise UserError(
            f"{output}: has scores of {outside.reward!r}, version {first['version']!r}, of which "
            f"{len(lost)} would be lost, the first of {first['id']}; choose another --reward or "
            "--output"
        )


def _matched(table: Table, name: str, column: str, source: Source) -> dict[str, float]:
    """The score of each item by its id; the others are refused in ``source``."""
    find = _finder(source.items, by_id=name == "id")
    given: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for row in table.rows:
        if row.is_blank:
            continue
        given_name = row.values.get(name)
        text = "" if given_name is None else str(given_name).strip()
        items = find(text)
        if len(items) != 1:
            reason = "is not an image of the source" if not items else "fits several images"
            source.refuse(text or row.place, f"{table.path.name}, {row.place}: {reason}")
        elif not _same_prompt(row, items[0]):
            source.refuse(text, f"{table.path.name}, {row.place}: it has another prompt")
        else:
            given[items[0].id].append((row.place, row.values.get(column)))
    found: dict[str, float] = {}
    items, source.items = source.items, []
    for item in items:
        rows = given[item.id]
        score = _number(rows[0][1]) if len(rows) == 1 else None
        if score is not None:
            found[item.id] = score
            source.items.append(item)
        elif not rows:
            source.refuse(item.id, f"no score in {table.path.name}")
        elif len(rows) > 1:
            places = ", ".join(place for place, _ in rows[:3])
            source.refuse(item.id, f"{len(rows)} scores in {table.path.name}: {places}")
        else:
            place, value = rows[0]
            source.refuse(
                item.id, f"{table.path.name}, {place}: {value!r} is not a finite 32-bit number"
            )
    return found


def _number(value: Any) -> float | None:
    """The number that ``value`` is, or None; one that float32 has, like every other score."""
    if isinstance(value, str):
        text = value.strip()
        # Python also reads 1_0 and the digits of other scripts, which other tools do not.
        value = TRUTH.get(text.casefold(), text if NUMBER.fullmatch(text) else None)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None


def _same_prompt(row: Row, item: Item) -> bool:
    prompt = row.values.get("prompt")
    return not isinstance(prompt, str) or prompt.strip() in ("", item.prompt)


def _finder(items: Sequence[Item], *, by_id: bool) -> Callable[[str], list[Item]]:
    """Finds the items that a row names: by id, or by a path that ends like theirs."""
    of_id = by_name({item.id: item for item in items})
    of_end: dict[tuple[str, ...], list[Item]] = defaultdict(list)
    for item in items:
        parts = _parts(item.name)
        for start in range(len(parts)):
            of_end[parts[start:]].append(item)

    def find(text: str) -> list[Item]:
        parts = () if by_id else _parts(text)
        # The path may begin above the source, or below it.
        for start in range(len(parts)):
            whole = [i for i in of_end.get(parts[start:], []) if _parts(i.name) == parts[start:]]
            if whole:
                return whole
        item = of_id(text)
        return of_end.get(parts, []) if item is None else [item]

    return find


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(normalize("NFC", path.replace("\\", "/"))).parts
