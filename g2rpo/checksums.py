"""JSON documents with checksums: of themselves, and of the files that belong to them.

A stage writes its document last, so the document marks the stage's files as complete. Before
anything builds on these files, they are compared with it. Documents and files that were written
before checksums were recorded are accepted.
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
"""Bytes of a file above which a listing only looks at its size."""

_most: ContextVar[float] = ContextVar("bytes of the largest file that is read", default=math.inf)


@contextmanager
def hashing_up_to(size: int = LARGE) -> Iterator[None]:
    """Inside of the block, files of more than ``size`` bytes are only checked by their size."""
    token = _most.set(size)
    try:
        yield
    finally:
        _most.reset(token)


def is_hashed(size: int) -> bool:
    """Whether files of ``size`` bytes are read and hashed here (:func:`hashing_up_to`)."""
    return size <= _most.get()


def checksums_of(files: Iterable[Path], folder: Path) -> dict[str, dict[str, Any]]:
    """The SHA-256 and size of each of ``files``, by its path relative to ``folder``."""
    return {
        os.path.relpath(path, folder): {"sha256": sha256_file(path), "size": path.stat().st_size}
        for path in sorted(files)
    }


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Writes ``document`` with its own checksum, atomically; the order of its keys is kept."""
    if path.is_dir():  # a damaged document in its place
        remove(path)
    text = json.dumps(with_checksum(document), indent=2, allow_nan=False)
    atomic_write_text(path, text + "\n")


def with_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with its own checksum, as :func:`parse_document` reads it."""
    return {**document, CHECKSUM: _digest(document)}


def parse_document(data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``, without its checksum.

    Raises:
        ValueError: it is no JSON object, or differs from what was written.
    """
    document: Any = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    recorded = document.pop(CHECKSUM, None)
    files = document.get(FILES)
    # One damaged bit may hide the checksum's own name; only newer documents list files with hashes.
    newer = isinstance(files, dict) and all(isinstance(one, dict) for one in files.values())
    if (recorded is not None or newer) and recorded != _digest(document):
        raise ValueError("its content does not match its own checksum")
    return document


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def problems(folder: Path, recorded: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """The files that are not as they were recorded, and what is wrong with each.

    Args:
        folder: what the paths are relative to.
        recorded: what :func:`checksums_of` gave; or sizes alone, as older versions wrote them.
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
            return f"has {status.st_size} bytes where {entry['size']} were written"
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
    del state  # a file that was changed is another call
    return sha256_file(path)


def check_exported(place: Path) -> None:
    """Compares weights with the checksums that were written with them, where there are any.

    Args:
        place: a folder that was exported, the checkpoint of a run, or something inside of one.

    Raises:
        UserError: a file is missing or damaged.
    """
    for folder in (place, *place.absolute().parents[:2]):
        # Other programs write a state.json as well.
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
