"""Where fetched files lie, and what their hashes were when they were last read.

Files of the model hub are in the ordinary Hugging Face cache (``HF_HOME``), where every loader
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
"""The snapshot of files that were copied from a folder and whose commit is not known."""


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


def place_of(artifact: Artifact, file: PublishedFile, revision: str | None) -> Path:
    """Where a file that the hub library does not fetch is put."""
    folder = repository_folder(artifact)
    if artifact.kind == "github":
        return folder / (revision or "HEAD") / file.path
    return folder / "snapshots" / (revision or MIRROR_SNAPSHOT) / file.path


def find(artifact: Artifact, file: PublishedFile, revision: str | None) -> Path | None:
    """The cached file at ``revision`` (None: the newest that was fetched), or None."""
    if artifact.kind == "github":
        path = place_of(artifact, file, revision)
        return path if path.is_file() else None
    found = try_to_load_from_cache(
        artifact.repo, file.path, revision=revision, repo_type=artifact.kind
    )
    return Path(found) if isinstance(found, str) else None


def commit_of(artifact: Artifact, path: Path) -> str | None:
    """The commit of the snapshot that the cached ``path`` lies in; None where it is not one."""
    parts = path.relative_to(repository_folder(artifact)).parts
    return next((part for part in parts[:2] if re.match(COMMIT, part)), None)


def blob(path: Path) -> Path:
    """What a snapshot's ``path`` links to, named by its content; ``path`` where it is no link.

    One step: where several repositories share a content, the blob is itself a link.
    """
    return path.parent / path.readlink() if path.is_symlink() else path


def remove(path: Path) -> None:
    """Deletes a cached file with its content; the content first, in case this is interrupted."""
    for part in (path.resolve(), blob(path), path):
        part.unlink(missing_ok=True)


class Digests:
    """Hashes of files, remembered for as long as their size and time of change stay.

    Hashing tens of gigabytes takes minutes, so it is done once and not at every load.
    """

    def __init__(self) -> None:
        self.path = own_cache() / "hashes.json"

    def _read(self) -> dict[str, object]:
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
        match self._read().get(key):
            case [size, changed, str(sha256)] if [size, changed] == state:
                return sha256
        return None

    def measure(self, path: Path) -> str:
        """Reads the file, remembers its SHA-256 and gives it."""
        key, state = self._state(path)
        sha256 = sha256_file(path)
        with suppress(OSError):  # a cache that cannot be written is only slower
            write_json(self.path, {**self._read(), key: [*state, sha256]})
        return sha256
