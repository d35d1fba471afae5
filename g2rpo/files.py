"""Atomic writes and file hashes.

A guard (:func:`publication_guard`) stops a process that may no longer write from publishing.
"""

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from g2rpo.errors import UserError


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_default_mode(path: Path, mode: int) -> None:
    """Gives a file or folder of :mod:`tempfile`, which is private, the default permissions."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


_guards: list[Callable[[], None]] = []


@contextmanager
def publication_guard(check: Callable[[], None]) -> Iterator[None]:
    """Within the block, all threads call ``check`` before they publish anything.

    ``check`` raises if this process may no longer write; existing files are then kept.
    """
    _guards.append(check)
    try:
        yield
    finally:
        _guards.remove(check)


def check_publication() -> None:
    """Raises if any guard no longer allows this process to write or delete.

    The functions below call it right before publishing. Call it before other writes and deletions
    of shared files, after listing them.
    """
    for check in tuple(_guards):
        check()


@contextmanager
def _guards_first() -> Iterator[None]:
    """Raises a guard's error in place of an :class:`OSError` in the block."""
    try:
        yield
    except OSError:
        # The process that took over may have deleted the temporary files.
        check_publication()
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to ``path``, renamed to ``path`` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        with _guards_first():
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            _set_default_mode(temporary, 0o666)
            check_publication()
            temporary.replace(path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path``: temporary file, fsync, rename."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes UTF-8 ``text`` to ``path`` atomically."""
    atomic_write_bytes(path, text.encode())


def remove(path: Path) -> None:
    """Deletes a file or folder, which may not exist, after :func:`check_publication`."""
    check_publication()
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Checks that ``path`` and its missing parents can be created.

    Raises:
        UserError: the closest existing parent is not a writable folder.
        OSError: the name is too long.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{path}: {above} is not a folder; choose another path")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {above} is not writable; choose another path")


def check_writable(folder: Path, option: str) -> None:
    """Creates ``folder`` and checks that files can be written in it.

    Raises:
        UserError: they cannot; names ``option``, which chose the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); choose another {option}"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON with sorted keys, atomically."""
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises :class:`UserError` if the file is missing or malformed."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; fetch the file again")
    return value


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends ``rows`` as JSON lines and syncs them to disk, after :func:`check_publication`.

    First terminates a last line that a kill truncated; readers skip it.
    """
    check_publication()
    text = "".join(json.dumps(dict(row), allow_nan=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = size > 0 and file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + text.encode())
        file.flush()
        os.fsync(file.fileno())


def _sync_tree(folder: Path) -> None:
    for written in (folder, *sorted(folder.rglob("*"))):
        if written.is_dir():
            _sync_folder(written)
        elif written.is_file():
            with written.open("rb+") as handle:
                os.fsync(handle.fileno())


def _temporary_folder(path: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder next to ``path`` that replaces ``path`` on success.

    Readers see the old folder, none, or the new one, never a partial one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_folder(path)
    try:
        with _guards_first():
            yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, path: Path) -> None:
    """Replaces ``path`` with the folder ``temporary`` next to it."""
    retired: Path | None = None
    try:
        with _guards_first():
            _sync_tree(temporary)
            _set_default_mode(temporary, 0o777)
            check_publication()
            if not path.is_dir():
                path.unlink(missing_ok=True)
            else:
                retired = _temporary_folder(path)
                path.replace(retired)
            temporary.replace(path)
            _sync_folder(path.parent)
    finally:
        if retired is not None:
            shutil.rmtree(retired, ignore_errors=True)


FileState = tuple[int, int, int, int, int]
"""Device, inode, mtime and ctime in ns, and size: changes whenever the file does."""


def file_state(path: Path) -> FileState | None:
    """Identifies the current version of a file; None if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    # Programs can set the mtime, but not the ctime.
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def guarded_folder(path: Path) -> None:
    """Creates a folder that group and others cannot write to, unless it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o755, exist_ok=True)  # minus the umask


def writable_by_others(path: Path) -> bool:
    """Whether group or others may replace files in the folder ``path``."""
    mode = path.stat().st_mode
    return bool(mode & 0o022) and not mode & stat.S_ISVTX


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_tree(folder: Path) -> str:
    """One SHA-256 of the relative names and hashes of all files below ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def sha256_files(paths: Sequence[Path], of: Callable[[Path], str] = sha256_file) -> str:
    """The SHA-256 of a single file, or of the names and hashes of several.

    ``of`` returns a file's hash, e.g. a remembered one.
    """
    hashes = {path.name: of(path) for path in paths}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    listing = "".join(f"{name} {sha256}\n" for name, sha256 in hashes.items())
    return hashlib.sha256(listing.encode()).hexdigest()
