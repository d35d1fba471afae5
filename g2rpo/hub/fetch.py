"""Fetching artifacts, from the hub, another server or a folder; what is not whole is refused."""

import errno
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from g2rpo.errors import UserError
from g2rpo.hub import cache
from g2rpo.hub.catalogue import COMMIT, SHA256, Artifact, PublishedFile
from g2rpo.hub.download import check_space, describe, disk_full, download
from g2rpo.hub.lock import Expected, Lock, expected, expected_of


def _silent(_: str) -> None:
    return None


@dataclass(frozen=True)
class FetchOptions:
    """Where to fetch from."""

    mirror: str | None = None
    """Address of a hub-compatible server, or a folder laid out ``owner/name/file``."""
    offline: bool = False
    """Never use the network; a mirror folder is no network."""
    newest: bool = False
    """Ask for the newest revision, whatever is cached or locked."""
    tell: Callable[[str], None] = field(default=_silent)
    """Called with a line for each file."""

    @property
    def endpoint(self) -> str | None:
        """The mirror where it is a server."""
        remote = self.mirror is not None and re.match(r"https?://", self.mirror)
        return self.mirror.rstrip("/") if self.mirror and remote else None

    @property
    def folder(self) -> Path | None:
        """The mirror where it is a folder; :class:`UserError` where there is none."""
        if self.mirror is None or self.endpoint is not None:
            return None
        folder = Path(self.mirror).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"--mirror {self.mirror}: no such folder; give a folder laid out "
                "owner/name/file, or an http(s) address"
            )
        return folder


def difference(path: Path, sha256: str | None, want: Expected) -> str | None:
    """What is wrong with a file, or None; ``sha256`` is its hash, None where not known."""
    size = path.stat().st_size
    if want.size is not None and size < want.size:
        return f"truncated: {size} of {want.size} bytes"
    if want.size is not None and size != want.size:
        return f"altered: {size} bytes where {want.size} are expected"
    if want.sha256 is not None and sha256 is not None and sha256 != want.sha256:
        return f"altered: its SHA-256 is {sha256[:12]}… where {want.sha256[:12]}… is expected"
    return None


def check_cached(path: Path, repo: str, name: str, revision: str | None) -> None:
    """Checks a cached file of a hub model before it is loaded, without reading it.

    Its size is compared, and its hash where one is remembered (:class:`cache.Digests`); a revision
    other than the pinned one is not checked.

    Raises:
        UserError: it is not the file that the catalogue or the lock states.
    """
    want = expected_of(repo, name)
    if revision != want.revision or (want.size is None and want.sha256 is None):
        return
    problem = difference(path, cache.Digests().known(path), want)
    if problem is not None:
        raise UserError(f"{repo} {name} is {problem}; run `g2rpo weights fetch {repo}` to mend it")


def fetch(artifact: Artifact, lock: Lock, options: FetchOptions) -> list[Path]:
    """Fetches the files of ``artifact`` that are not cached whole, and gives all their paths.

    Raises:
        UserError: a file cannot be had, or is not what the catalogue or the lock says; one line
            that names it.
    """
    digests = cache.Digests()
    lock = Lock() if options.newest else lock
    return [_fetch_file(artifact, file, lock, options, digests) for file in artifact.files]


def _fetch_file(
    artifact: Artifact,
    file: PublishedFile,
    lock: Lock,
    options: FetchOptions,
    digests: cache.Digests,
) -> Path:
    want = expected(artifact, file, lock)
    label = f"{artifact.name}: {file.path}"
    ask = options.newest and want.revision is None
    path = None if ask else cache.find(artifact, file, want.revision)
    if path is not None:
        sha256 = digests.known(path)
        if sha256 is None and want.sha256 is not None:
            sha256 = digests.measure(path)
        problem = difference(path, sha256, want)
        if problem is None:
            options.tell(f"{label}: cached")
            return path
        if options.offline and options.folder is None:
            raise UserError(f"{label} is {problem}; fetch it again where there is a network")
        options.tell(f"{label}: {problem}; fetching it again")
        cache.remove(path)
    try:
        if options.folder is not None:
            path, sha256 = _from_folder(artifact, file, want, options.folder)
        elif options.offline:
            raise UserError(
                f"{label} is not in the cache and --offline is given; leave it out, or give "
                "--mirror with a folder"
            )
        else:
            path, sha256 = _from_server(artifact, file, want, options.endpoint)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            disk_full(label, cache.repository_folder(artifact), reason)
        raise UserError(f"{label}: {error.filename or 'the cache'}: {reason}") from None
    digests.record(path, sha256)
    options.tell(f"{label}: fetched, SHA-256 {sha256[:12]}…")
    return path


def _from_server(
    artifact: Artifact, file: PublishedFile, want: Expected, endpoint: str | None
) -> tuple[Path, str]:
    label = f"{artifact.name}: {file.path}"
    remote = describe(artifact, file, want.revision, endpoint)
    if artifact.kind != "github" and want.size is not None and remote.size not in (None, want.size):
        raise UserError(
            f"{label} is {'truncated' if (remote.size or 0) < want.size else 'altered'} on the "
            f"server: it has {remote.size} bytes where {want.size} are expected; try another "
            "--mirror, or correct the lock file if the publisher changed it on purpose"
        )
    part = cache.part_path(artifact, remote.name)
    snapshot, ref = remote.commit or "HEAD", want.revision or "main"
    with cache.exclusive(artifact, part):
        blob = cache.blob_path(artifact, remote.name)
        whole = artifact.kind != "github" and blob.is_file()
        if not whole:
            download(remote, part, artifact, file)
        content = blob if whole else part
        sha256 = cache.hash_file(content, hashlib.sha256())
        problem = difference(content, sha256, want)
        if problem is None and artifact.kind != "github":
            problem = misnamed(content, sha256, remote.name)
        if problem is not None:
            content.unlink()
            raise UserError(
                f"{label} is {problem}; what came was deleted: fetch it again, or from another "
                "--mirror; if it was changed on purpose, delete its entry in the lock file"
            )
        path = cache.place(artifact, file, content, blob=blob.name, snapshot=snapshot, ref=ref)
    return path, sha256


def misnamed(path: Path, sha256: str, name: str) -> str | None:
    """What is wrong with a file of the hub against the name of its content, or None.

    The hub, and so its cache, names large files by their SHA-256 and small ones as git does.
    """
    if re.match(SHA256, name) and name != sha256:
        return f"altered: its SHA-256 is {sha256[:12]}… where its name is {name[:12]}…"
    if re.match(COMMIT, name) and name != cache.git_blob_hash(path):
        return f"altered: its content is not what its name {name[:12]}… says"
    return None


def _from_folder(
    artifact: Artifact, file: PublishedFile, want: Expected, folder: Path
) -> tuple[Path, str]:
    label = f"{artifact.name}: {file.path}"
    source = folder / artifact.repo / file.path
    if not source.is_file():
        raise UserError(f"{label}: the mirror has no {source}; copy the file there")
    problem = difference(source, None, want)
    if problem is not None:
        raise UserError(f"{label} is {problem} in the mirror; replace {source}")
    status = source.stat()
    name = f"{source.resolve()} {status.st_size} {status.st_mtime_ns}"
    part = cache.part_path(artifact, hashlib.sha256(name.encode()).hexdigest() + ".mirror")
    with cache.exclusive(artifact, part):
        _copy(source, part, label)
        sha256 = cache.hash_file(part, hashlib.sha256())
        problem = difference(part, sha256, want)
        if problem is not None:
            part.unlink()
            raise UserError(f"{label} is {problem} in the mirror; replace {source}")
        snapshot = want.revision or cache.MIRROR_SNAPSHOT
        ref = want.revision or "main"
        if artifact.kind == "github":
            snapshot = ref = want.revision or "HEAD"
        path = cache.place(artifact, file, part, blob=sha256, snapshot=snapshot, ref=ref)
    return path, sha256


def _copy(source: Path, part: Path, label: str) -> None:
    """Copies ``source``, going on from the bytes that ``part`` has."""
    start = part.stat().st_size if part.exists() else 0
    check_space(label, part.parent, source.stat().st_size - start)
    with source.open("rb") as reader, part.open("ab", buffering=0) as writer:
        reader.seek(start)
        while chunk := reader.read(cache.CHUNK):
            writer.write(chunk)
