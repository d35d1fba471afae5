"""Where fetched files lie, and what their hashes were when they were last read.

Files of the model hub go into the ordinary Hugging Face cache (``HF_HOME``), in its documented
layout: ``blobs/`` holds contents, ``snapshots/COMMIT/`` links to them under their names and
``refs/main`` names a commit. So every loader finds them. The rest is in ``G2RPO_CACHE``
(``~/.cache/g2rpo``).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, try_to_load_from_cache

from g2rpo.files import atomic_write_text, write_json
from g2rpo.hub.catalogue import COMMIT, Artifact, PublishedFile
from g2rpo.progress import ProgressReport

CACHE_VARIABLE = "G2RPO_CACHE"
MIRROR_SNAPSHOT = "mirror"
"""The snapshot of files that were copied from a folder and whose commit is not known."""
CHUNK = 1 << 20


def own_cache() -> Path:
    """The folder for what does not belong into the Hugging Face cache."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / "g2rpo"


def repository_folder(artifact: Artifact) -> Path:
    """The folder of a repository in the cache that its kind belongs to."""
    flat = artifact.repo.replace("/", "--")
    if artifact.kind == "github":
        return own_cache() / "github" / flat
    return Path(constants.HF_HUB_CACHE) / f"{artifact.kind}s--{flat}"


def find(artifact: Artifact, file: PublishedFile, revision: str | None) -> Path | None:
    """The cached file at ``revision`` (None: the newest that was fetched), or None."""
    if artifact.kind == "github":
        path = repository_folder(artifact) / (revision or "HEAD") / file.path
        return path if path.is_file() else None
    found = try_to_load_from_cache(
        artifact.repo, file.path, revision=revision, repo_type=artifact.kind
    )
    return Path(found) if isinstance(found, str) else None


def commit_of(artifact: Artifact, path: Path) -> str | None:
    """The commit of the snapshot that the cached ``path`` lies in; None where it is not one."""
    try:
        parts = path.relative_to(repository_folder(artifact)).parts
    except ValueError:
        return None
    candidates = [part for part in parts[:2] if re.match(COMMIT, part)]
    return candidates[0] if candidates else None


def part_path(artifact: Artifact, name: str) -> Path:
    """Where a file that is still being fetched lies; ``name`` stands for its exact content."""
    folder = repository_folder(artifact)
    safe = (
        name if re.fullmatch(r"[\w.-]{1,100}", name) else hashlib.sha256(name.encode()).hexdigest()
    )
    return folder / ("parts" if artifact.kind == "github" else "blobs") / f"{safe}.part"


@contextmanager
def exclusive(artifact: Artifact, part: Path) -> Iterator[None]:
    """Keeps other processes from fetching into ``part``; makes its folder."""
    part.parent.mkdir(parents=True, exist_ok=True)
    folder = repository_folder(artifact)
    lock = folder.parent / ".locks" / folder.name / f"{part.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        yield


def blob_path(artifact: Artifact, name: str) -> Path:
    """Where a whole content named ``name`` lies in the Hugging Face cache."""
    return part_path(artifact, name).with_suffix("")


def _link(blob: Path, pointer: Path) -> None:
    pointer.parent.mkdir(parents=True, exist_ok=True)
    temporary = pointer.with_name(f".{pointer.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:  # a file system without links: the snapshot holds the file itself
        blob.replace(pointer)
        return
    temporary.replace(pointer)


def place(
    artifact: Artifact, file: PublishedFile, content: Path, *, blob: str, snapshot: str, ref: str
) -> Path:
    """Moves a whole, checked ``content`` to where loaders find it, and gives that path.

    Args:
        artifact: what the file belongs to.
        file: the file.
        content: a file on the same file system; it is moved.
        blob: the name of the content.
        snapshot: the commit, or what stands for it.
        ref: the revision that was asked for; where it is a branch, it then means ``snapshot``.
    """
    folder = repository_folder(artifact)
    if artifact.kind == "github":
        path = folder / snapshot / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        content.replace(path)
        return path
    target = blob_path(artifact, blob)
    if content != target:
        content.replace(target)
    pointer = folder / "snapshots" / snapshot / file.path
    _link(target, pointer)
    if ref != snapshot:
        atomic_write_text(folder / "refs" / ref, snapshot)
    return pointer


def remove(path: Path) -> None:
    """Deletes a cached file and its content."""
    content = path.resolve()
    path.unlink(missing_ok=True)
    content.unlink(missing_ok=True)


class Digests:
    """Hashes of files, remembered for as long as their size and time of change stay.

    Hashing tens of gigabytes takes minutes, so that loaders only compare what is remembered.
    """

    def __init__(self) -> None:
        self.path = own_cache() / "hashes.json"

    def _read(self) -> dict[str, list[object]]:
        try:
            value = json.loads(self.path.read_text())
        except (OSError, ValueError):  # a memory that is lost or damaged is only slower
            return {}
        return value if isinstance(value, dict) else {}

    @staticmethod
    def _state(path: Path) -> tuple[str, list[object]]:
        content = path.resolve()
        status = content.stat()
        return str(content), [status.st_size, status.st_mtime_ns]

    def known(self, path: Path) -> str | None:
        """The remembered SHA-256 of an unchanged file, or None."""
        key, state = self._state(path)
        entry = self._read().get(key)
        if not isinstance(entry, list) or entry[:2] != state or len(entry) != 3:
            return None
        return str(entry[2])

    def record(self, path: Path, sha256: str) -> None:
        """Remembers the SHA-256 of a file; a cache that cannot be written is no error."""
        key, state = self._state(path)
        try:
            write_json(self.path, {**self._read(), key: [*state, sha256]})
        except OSError:
            return

    def measure(self, path: Path) -> str:
        """Reads the file, remembers its SHA-256 and gives it."""
        sha256 = hash_file(path, hashlib.sha256())
        self.record(path, sha256)
        return sha256


def hash_file(path: Path, digest: "hashlib._Hash") -> str:
    """The hexadecimal digest of a file, with progress where it is large."""
    size = path.stat().st_size
    with (
        path.open("rb") as handle,
        ProgressReport(
            f"hashing {path.name[:40]}, MB", size // 10**6, enabled=size > 10**9
        ) as report,
    ):
        done = 0
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report.update(done // 10**6)
    return digest.hexdigest()


def git_blob_hash(path: Path) -> str:
    """The name that git gives to a file's content, which is the hub's ETag of small files."""
    header = f"blob {path.stat().st_size}\0".encode()
    return hash_file(path, hashlib.sha1(header, usedforsecurity=False))
