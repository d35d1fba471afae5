"""Where fetched files are stored, and their remembered hashes.

Files from the model hub are in the standard Hugging Face cache (``HF_HOME``), where every loader
looks. The rest is in ``G2RPO_CACHE`` (``~/.cache/g2rpo``).
"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from g2rpo.files import sha256_file, write_json
from g2rpo.hub.catalogue import COMMIT, Artifact, PublishedFile

CACHE_VARIABLE = "G2RPO_CACHE"
MIRROR_SNAPSHOT = "mirror"
"""The snapshot of files copied from a folder, whose commit is unknown."""


def own_cache() -> Path:
    """The folder for everything that does not belong in the Hugging Face cache."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / "g2rpo"


def repository_folder(artifact: Artifact) -> Path:
    """A repository's folder in the cache for its kind."""
    flat = artifact.repo.replace("/", "--")
    if artifact.kind == "github":
        return own_cache() / "github" / flat
    return Path(constants.HF_HUB_CACHE) / f"{artifact.kind}s--{flat}"


def place_of(artifact: Artifact, file: PublishedFile, revision: str | None) -> Path:
    """Where to put a file that huggingface_hub does not fetch."""
    folder = repository_folder(artifact)
    if artifact.kind == "github":
        return folder / (revision or "HEAD") / file.path
    return folder / "snapshots" / (revision or MIRROR_SNAPSHOT) / file.path


def find(artifact: Artifact, file: PublishedFile, revision: str | None) -> Path | None:
    """The cached file at ``revision`` (None: the last one fetched), or None."""
    if artifact.kind == "github":
        path = place_of(artifact, file, revision)
        return path if path.is_file() else None
    found = try_to_load_from_cache(
        artifact.repo, file.path, revision=revision, repo_type=artifact.kind
    )
    return Path(found) if isinstance(found, str) else None


def commit_of(artifact: Artifact, path: Path) -> str | None:
    """The commit of the snapshot with the cached ``path``; None if it is not known."""
    parts = path.relative_to(repository_folder(artifact)).parts
    return next((part for part in parts[:2] if re.match(COMMIT, part)), None)


def blob(path: Path) -> Path:
    """The blob that a snapshot's ``path`` links to, named by its content; else ``path`` itself.

    Follows one link only: a blob shared by several repositories is itself a link.
    """
    return path.parent / path.readlink() if path.is_symlink() else path


def remove(path: Path) -> None:
    """Deletes a cached file and its blob; the blob first, in case this is interrupted."""
    for part in (path.resolve(), blob(path), path):
        part.unlink(missing_ok=True)


class Digests:
    """Remembered file hashes, valid until a file's size or modification time changes.

    Hashing tens of gigabytes takes minutes, too long for every load.
    """

    def __init__(self) -> None:
        self.path = own_cache() / "hashes.json"

    def _read(self) -> dict[str, object]:
        try:
            value = json.loads(self.path.read_text())
        except (OSError, ValueError):  # only slower
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
        match self._read().get(key):
            case [size, changed, str(sha256)] if [size, changed] == state:
                return sha256
        return None

    def measure(self, path: Path) -> str:
        """Hashes the file, remembers the SHA-256 and returns it."""
        key, state = self._state(path)
        sha256 = sha256_file(path)
        with suppress(OSError):  # only slower
            write_json(self.path, {**self._read(), key: [*state, sha256]})
        return sha256

    def of(self, path: Path) -> str:
        """The SHA-256 of a file, which is only read if it has changed."""
        return self.known(path) or self.measure(path)
