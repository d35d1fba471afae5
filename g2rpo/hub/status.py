"""The state of cached files, and recording them in the lock."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from g2rpo.errors import UserError
from g2rpo.hub import cache
from g2rpo.hub.catalogue import Artifact, PublishedFile
from g2rpo.hub.fetch import difference
from g2rpo.hub.lock import Expected, Lock, LockedFile, LockedRepository, expected

FileWord = Literal["ok", "missing", "altered", "not locked"]
ArtifactWord = Literal["missing", "partly", "cached", "locked", "altered"]


@dataclass(frozen=True)
class FileState:
    """One file: ``ok`` matches its hash, ``not locked`` is cached but has no stated hash."""

    word: FileWord
    path: Path | None = None
    detail: str = ""


@dataclass(frozen=True)
class ArtifactState:
    """An artifact: ``locked`` has all files with stated hashes, ``cached`` has all files."""

    artifact: Artifact
    word: ArtifactWord
    folder: Path | None
    """The folder of its first cached file."""

    @property
    def is_whole(self) -> bool:
        """Whether all files are cached and intact."""
        return self.word in ("locked", "cached")


def file_state(artifact: Artifact, file: PublishedFile, lock: Lock, *, rehash: bool) -> FileState:
    """The state of one file; ``rehash`` reads it, otherwise its remembered hash is compared."""
    want = expected(artifact, file, lock)
    path = cache.find(artifact, file, want.revision)
    if path is None:
        return FileState("missing")
    digests = cache.Digests()
    sha256 = digests.measure(path) if rehash else digests.known(path)
    problem = difference(path, sha256, want)
    if problem is not None:
        return FileState("altered", path, problem)
    return FileState("not locked" if want.sha256 is None else "ok", path)


def artifact_state(artifact: Artifact, lock: Lock) -> ArtifactState:
    """The state of an artifact; does not read its files."""
    states = [file_state(artifact, file, lock, rehash=False) for file in artifact.files]
    words = {state.word for state in states}
    paths = [state.path for state in states if state.path is not None]
    word: ArtifactWord = "locked" if words == {"ok"} else "cached"
    if "altered" in words:
        word = "altered"
    elif "missing" in words:
        word = "partly" if paths else "missing"
    return ArtifactState(artifact, word, paths[0].parent if paths else None)


def lock_cached(artifacts: Iterable[Artifact], lock: Lock, *, update: bool) -> Lock:
    """``lock`` with the cached files for which the catalogue states no hash or revision.

    ``update``: record the newest cached revision instead of the locked one.

    Raises:
        UserError: a cached file does not match its blob name.
    """
    for artifact in artifacts:
        for file in artifact.files:
            entry = lock.repository(artifact.key)
            path = cache.find(artifact, file, artifact.revision) if update else None
            path = path or cache.find(artifact, file, artifact.revision or entry.revision)
            if path is None:
                continue
            files, revision = dict(entry.files), entry.revision
            if file.sha256 is None:
                files[file.path] = _measured(artifact, file, path)
            if artifact.revision is None:
                revision = cache.commit_of(artifact, path) or revision
            if files or revision:
                entry = LockedRepository(revision=revision, files=files)
                lock = Lock(repositories={**lock.repositories, artifact.key: entry})
    return lock


def _measured(artifact: Artifact, file: PublishedFile, path: Path) -> LockedFile:
    sha256 = cache.Digests().measure(path)
    problem = difference(path, sha256, Expected(None, None, None))
    if problem is not None:
        raise UserError(f"{artifact.name}: {file.path} is {problem}; not locked: fetch it again")
    return LockedFile(sha256=sha256, size=path.stat().st_size)
