"""Files that are either whole or absent: atomic writes, and hashes of what was written.

A guard (:func:`publication_guard`) keeps a process that may no longer write from publishing.
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


_guards: list[Callable[[], None]] = []


@contextmanager
def publication_guard(check: Callable[[], None]) -> Iterator[None]:
    """Inside of the block, in all threads, nothing is published unless ``check`` returns.

    ``check`` raises where this process may no longer write; what it would have replaced stays.
    """
    _guards.append(check)
    try:
        yield
    finally:
        _guards.remove(check)


def check_publication() -> None:
    """Asks all guards whether this process may still write or delete.

    Everything below does so right before it publishes; call it before other writes and deletions
    of shared files, after they have been listed.
    """
    for check in tuple(_guards):
        check()


@contextmanager
def _told_by_guards() -> Iterator[None]:
    """An error in the block is the guards', where they have one."""
    try:
        yield
    except OSError:
        # Whoever took over may have deleted the temporary files: that is not what went wrong.
        check_publication()
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, renamed to ``path`` when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        with _told_by_guards():
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            # mkstemp creates the file for its owner alone; give it the ordinary permissions.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
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
    """Deletes a file, or a folder with all in it, where this process may; nothing is no error."""
    check_publication()
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Asks, before it is made, whether ``path`` can be written, and missing folders above it.

    Raises:
        UserError: what is there above it is no folder, or none that may be written to.
        OSError: the name is too long.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{path}: {above} is no folder; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {above} cannot be written; choose another place")


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON with sorted keys, atomically."""
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises :class:`UserError` where the file is absent or broken."""
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
    """Appends a line of JSON for each of ``rows``, and waits until they are on disk.

    A last line that a kill cut short is closed first, so that it takes no other with it; readers
    leave it out. Nothing is written by a process that may not publish.
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
    """Yields a temporary folder beside ``path``; it takes the place of ``path`` on success.

    A reader sees the old folder, none, or the new one, never a half-written or half-deleted one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_folder(path)
    try:
        with _told_by_guards():
            yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, path: Path) -> None:
    """Lets the whole folder ``temporary``, beside ``path``, take its place."""
    retired: Path | None = None
    try:
        with _told_by_guards():
            _sync_tree(temporary)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o777 & ~umask)
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
"""Device, inode, times of the last changes in ns, size: another one where a file was changed."""


def file_state(path: Path) -> FileState | None:
    """What tells that a file is still the same; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    # The first time can be set by anybody, the second by the system alone.
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def guarded_folder(path: Path) -> None:
    """Makes a folder, where there is none, that the group and others cannot write to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o755, exist_ok=True)  # less what the umask takes away


def writable_by_others(path: Path) -> bool:
    """Whether the group or others may replace what is in the folder ``path``."""
    mode = path.stat().st_mode
    return bool(mode & 0o022) and not mode & stat.S_ISVTX


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_tree(folder: Path) -> str:
    """One SHA-256 over the relative names and hashes of all files below ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def sha256_files(paths: Sequence[Path], of: Callable[[Path], str] = sha256_file) -> str:
    """The SHA-256 of the one file of ``paths``, else one over the names and hashes of them all.

    ``of`` gives a file's hash, where it need not be read for that.
    """
    hashes = {path.name: of(path) for path in paths}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    listing = "".join(f"{name} {sha256}\n" for name, sha256 in hashes.items())
    return hashlib.sha256(listing.encode()).hexdigest()
