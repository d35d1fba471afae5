"""The lock file: revisions and hashes of fetched files for which the catalogue states none.

It is next to the catalogue, so that a repository can commit it. ``G2RPO_WEIGHTS_LOCK`` overrides
its path.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from g2rpo.config import StrictModel, validate
from g2rpo.errors import UserError
from g2rpo.files import write_json
from g2rpo.hub.catalogue import COMMIT, SHA256, Artifact, PublishedFile, catalogue

LOCK_VARIABLE = "G2RPO_WEIGHTS_LOCK"
Change = tuple[str, str | None, str | None]
"""What changed, its value before (None if it is new), and after."""


class LockedFile(StrictModel):
    """A file's hash and size when it was locked."""

    sha256: str = Field(pattern=SHA256)
    size: int = Field(ge=0)


class LockedRepository(StrictModel):
    """A repository's files, and its commit (None if they came from a mirror folder)."""

    revision: str | None = Field(None, pattern=COMMIT)
    files: dict[str, LockedFile] = Field(default_factory=dict)


class Lock(StrictModel):
    """Repositories by :attr:`Artifact.key`."""

    version: int = Field(1, ge=1, le=1)
    repositories: dict[str, LockedRepository] = Field(default_factory=dict)

    def repository(self, key: str) -> LockedRepository:
        """The entry of a repository; empty if there is none."""
        return self.repositories.get(key, LockedRepository())

    def changes(self, new: "Lock") -> list[Change]:
        """The revisions and SHA-256 hashes that differ in ``new``."""
        found: list[Change] = []
        for key, entry in new.repositories.items():
            before = self.repository(key)
            for path, file in entry.files.items():
                old = before.files.get(path)
                found.append((f"{key} {path}", old.sha256 if old else None, file.sha256))
            found.append((f"{key} revision", before.revision, entry.revision))
        return [change for change in found if change[1] != change[2]]


@dataclass(frozen=True)
class Expected:
    """What a file should be, by the catalogue, else the lock; None if neither states it."""

    revision: str | None
    size: int | None
    sha256: str | None


def lock_path() -> Path:
    """The path of the lock file, which may not exist."""
    named = os.environ.get(LOCK_VARIABLE)
    return Path(named).expanduser() if named else Path(__file__).with_name("lock.json")


def read_lock(path: Path | None = None) -> Lock:
    """The lock at ``path`` (default: :func:`lock_path`); empty if there is no file.

    Raises:
        UserError: the file cannot be read, or is not a lock file.
    """
    path = path or lock_path()
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Lock()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable lock file ({error}); restore or delete it"
        ) from None
    return validate(Lock, data, str(path))


def write_lock(lock: Lock, path: Path | None = None) -> None:
    """Writes ``lock`` with sorted keys, atomically."""
    write_json(path or lock_path(), lock.model_dump(mode="json"))


def pinned_revision(artifact: Artifact, lock: Lock) -> str | None:
    """The commit to which ``artifact`` is pinned, or None."""
    return artifact.revision or lock.repository(artifact.key).revision


def expected(artifact: Artifact, file: PublishedFile, lock: Lock) -> Expected:
    """What ``file`` should be."""
    locked = lock.repository(artifact.key).files.get(file.path)
    size = file.size if file.size is not None or locked is None else locked.size
    sha256 = file.sha256 or (locked.sha256 if locked else None)
    return Expected(pinned_revision(artifact, lock), size, sha256)


def revision_of(repo: str) -> str | None:
    """The commit to which the Hugging Face model ``repo`` is pinned, or None."""
    lock = read_lock()
    pinned = [pinned_revision(artifact, lock) for artifact in catalogue().of_repository(repo)]
    return pinned[0] if pinned else lock.repository(repo).revision


def expected_of(repo: str, path: str) -> Expected:
    """What the file ``path`` of the Hugging Face model ``repo`` should be."""
    lock = read_lock()
    for artifact in catalogue().of_repository(repo):
        for file in artifact.files:
            if file.path == path:
                return expected(artifact, file, lock)
    locked = lock.repository(repo).files.get(path)
    size, sha256 = (locked.size, locked.sha256) if locked else (None, None)
    return Expected(revision_of(repo), size, sha256)
