"""What a sheet hides: which picture of a pair is whose."""

import json
from pathlib import Path
from typing import Literal

import pydantic

from g2rpo.config import StrictModel, validate
from g2rpo.errors import UserError

Choice = Literal["left", "right", "tie"]
COLUMNS = ("sheet", "rater", "pair", "answer")
"""Of a file of answers."""
FORMAT: Literal["g2rpo rater key"] = "g2rpo rater key"


class Pair(StrictModel):
    """One pair: what was on which side."""

    pair: str
    prompt_id: str
    prompt: str
    left: Literal["first", "second"]
    first_sha256: str
    """Of the picture's own file, before it was copied."""
    second_sha256: str


class SheetKey(StrictModel):
    """The key of a sheet."""

    format: Literal["g2rpo rater key"] = FORMAT
    version: Literal[1] = 1
    sheet: str
    """Names the sheet; answers carry it."""
    first: str
    second: str
    protocol: str | None
    """Under which both were sampled; None where that is not known."""
    seed: int
    """Of the order and the sides."""
    question: str
    pairs: tuple[Pair, ...] = pydantic.Field(min_length=1)


def read_key(path: Path) -> SheetKey:
    """Reads a key.

    Raises:
        UserError: it is none.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such key; `g2rpo raters make` writes one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a key ({error})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path}: is not the key of a sheet; `g2rpo raters make` writes one")
    return validate(SheetKey, data, str(path))
