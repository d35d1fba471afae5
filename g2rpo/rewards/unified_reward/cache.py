"""Answers kept on disk: one small file each, so that processes on any file system can share them.

(A database would need file locks that network file systems do not keep.)
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.files import atomic_write_text
from g2rpo.hub.cache import own_cache

VERSION = 1


def default_folder() -> Path:
    """``answers`` in the folder that ``G2RPO_CACHE`` names."""
    return own_cache() / "answers"


def answer_key(image: Tensor, prompt: str, asked: dict[str, Any]) -> str:
    """The SHA-256 of all that an answer depends on; ``asked``: model, template, settings."""
    digest = hashlib.sha256()
    head = {"version": VERSION, "shape": list(image.shape), "prompt": prompt, "asked": asked}
    # Numbers and text first, in JSON, so that they cannot run into the pixels behind them.
    digest.update(json.dumps(head, sort_keys=True).encode() + b"\n")
    digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()


class AnswerCache:
    """Answers by key in ``folder``; whole or absent, and safe for threads and processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the answer of ``key`` is kept."""
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> str | None:
        """The answer of ``key``; None where there is none, or a file that cannot be read."""
        try:
            entry = json.loads(self.path(key).read_bytes())
        except (OSError, ValueError):
            return None
        answer = entry.get("answer") if isinstance(entry, dict) else None
        return answer if isinstance(answer, str) else None

    def put(self, key: str, answer: str) -> None:
        """Keeps ``answer``.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            atomic_write_text(self.path(key), json.dumps({"answer": answer}) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.folder}: answers cannot be kept ({error.strerror}); set "
                "question.cache_folder to a folder that can be written, or question.cache: false"
            ) from None
