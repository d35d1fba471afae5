"""The key of a sheet: which image of a pair is whose."""

import json
from pathlib import Path
from typing import Literal

import pydantic

from g2rpo.config import StrictModel, validate
from g2rpo.errors import UserError

Choice = Literal["left", "right", "tie"]
COLUMNS = ("sheet", "rater", "pair", "answer")
"""Columns of an answers file."""
FORMAT: Literal["g2rpo rater key"] = "g2rpo rater key"


class Pair(StrictModel):
    """One pair, and its sides."""

    pair: str
    prompt_id: str
    prompt: str
    left: Literal["first", "second"]
    first_sha256: str
    """Hash of the original file."""
    second_sha256: str


class SheetKey(StrictModel):
    """The key of a sheet."""

    format: Literal["g2rpo rater key"] = FORMAT
    version: Literal[1] = 1
    sheet: str
    """Identifies the sheet in its answers."""
    first: str
    second: str
    protocol: str | None
    """The evaluation protocol of both sides; None if unknown."""
    seed: int
    """Seed of the order and sides."""
    question: str
    pairs: tuple[Pair, ...] = pydantic.Field(min_length=1)


def read_key(path: Path) -> SheetKey:
    """Reads a key.

    Raises:
        UserError: it is not a key.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `g2rpo raters make` writes the key") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the key ({error})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path}: not the key of a sheet; `g2rpo raters make` writes one")
    return validate(SheetKey, data, str(path))
