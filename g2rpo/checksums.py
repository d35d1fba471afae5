"""JSON documents with checksums of themselves and of the files they describe.

A stage writes its document last, so the document marks the stage's files as complete. The files
are compared with it before they are used. Documents and files from versions without checksums are
accepted.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

from g2rpo.errors import UserError
from g2rpo.files import FileState, atomic_write_text, file_state, remove, sha256_file

CHECKSUM = "document_sha256"
FILES = "files"
EXPORTED = "checksums.json"
"""The document of exported weights."""
LARGE = 256 * 2**20
"""Listings only check the size of files with more bytes."""

_most: ContextVar[float] = ContextVar("largest file that is hashed, in bytes", default=math.inf)


@contextmanager
def hashing_up_to(size: int = LARGE) -> Iterator[None]:
    """Within the block, only the size of files with more than ``size`` bytes is checked."""
    token = _most.set(size)
    try:
        yield
    finally:
        _most.reset(token)


def is_hashed(size: int) -> bool:
    """Whether files of ``size`` bytes are hashed (:func:`hashing_up_to`)."""
    return size <= _most.get()


def checksums_of(files: Iterable[Path], folder: Path) -> dict[str, dict[str, Any]]:
    """The SHA-256 and size of each of ``files``, by path relative to ``folder``."""
    return {
        os.path.relpath(path, folder): {"sha256": sha256_file(path), "size": path.stat().st_size}
        for path in sorted(files)
    }


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Writes ``document`` with its own checksum, atomically; keeps the order of its keys."""
    if path.is_dir():  # in place of a damaged document
        remove(path)
    text = json.dumps(with_checksum(document), indent=2, allow_nan=False)
    atomic_write_text(path, text + "\n")


def with_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with its own checksum, as read by :func:`parse_document`."""
    return {**document, CHECKSUM: _digest(document)}


def parse_document(data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``, without its checksum.

    Raises:
        ValueError: it is not a JSON object, or not what was written.
    """
    document: Any = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    recorded = document.pop(CHECKSUM, None)
    files = document.get(FILES)
    # A damaged bit may hide the checksum's name; only newer documents list files with hashes.
    newer = isinstance(files, dict) and all(isinstance(one, dict) for one in files.values())
    if (recorded is not None or newer) and recorded != _digest(document):
        raise ValueError("its content does not match its checksum")
    return document


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def problems(folder: Path, recorded: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """The files in ``folder`` that differ from their records, and what is wrong with each.

    ``recorded``: the result of :func:`checksums_of`, or only sizes, from older versions.
    """
    for name, entry in recorded.items():
        path = Path(os.path.normpath(folder / name))
        problem = _problem(path, {"size": entry} if isinstance(entry, int) else entry)
        if problem is not None:
            yield path, problem


def _problem(path: Path, entry: Mapping[str, Any]) -> str | None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "is not a file"
        if status.st_size != entry["size"]:
            return f"has {status.st_size} bytes, expected {entry['size']}"
        if "sha256" not in entry or not is_hashed(status.st_size):
            return None
        sound = _sha256(path, file_state(path)) == entry["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if sound else "does not match its recorded SHA-256"


@lru_cache(maxsize=4096)
def _sha256(path: Path, state: FileState | None) -> str:
    del state  # changed files are hashed again
    return sha256_file(path)


def check_exported(place: Path) -> None:
    """Compares weights with the checksums of their export or checkpoint, if there are any.

    ``place``: an exported folder, a run's checkpoint, or something inside one.

    Raises:
        UserError: a file is missing or damaged.
    """
    for folder in (place, *place.absolute().parents[:2]):
        # Other programs also write a state.json.
        name = "state.json" if folder.name.startswith("iteration-") else EXPORTED
        document = folder / name
        try:
            recorded = parse_document(document.read_bytes()).get(FILES, {})
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise UserError(
                f"{document}: damaged ({error}); export or copy {folder} again"
            ) from None
        for path, problem in problems(folder, recorded):
            raise UserError(f"{path} {problem}; export or copy {folder} again")
