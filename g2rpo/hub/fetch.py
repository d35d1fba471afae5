"""Fetches files from the hub, another server or a folder, and checks them.

huggingface_hub downloads to a temporary name, so that a killed process leaves no incomplete file
for loaders to find. Here, files are compared with the catalogue and the lock file.
"""

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.file_download import http_get

from g2rpo.errors import UserError
from g2rpo.files import atomic_path, atomic_write_text, sha256_file
from g2rpo.hub import cache
from g2rpo.hub.catalogue import COMMIT, SHA256, Artifact, PublishedFile, catalogue
from g2rpo.hub.errors import Wanted, one_line
from g2rpo.hub.lock import Expected, Lock, expected, expected_of, read_lock, revision_of

ABANDONED = 3600
"""Age in seconds at which a partial download no longer belongs to a live process."""
RAW_GITHUB = "https://raw.githubusercontent.com"
OTHER_FORMATS = ["*.bin", "*.msgpack", "*.onnx", "*.onnx_data", "*.h5", "*.fp16*"]
"""The same weights in formats and variants that are not used."""


@dataclass(frozen=True)
class FetchOptions:
    """Where to fetch from."""

    mirror: str | None = None
    """URL of a hub-compatible server, or a folder with files at ``owner/name/file``."""
    offline: bool = False
    """Never use the network; a mirror folder is still read."""
    newest: bool = False
    """Fetch the newest revision, whatever is cached or locked."""
    report: Callable[[str], None] = lambda _: None
    """Receives one line per file."""

    @property
    def endpoint(self) -> str | None:
        """The mirror if it is a server."""
        remote = self.mirror is not None and re.match(r"https?://", self.mirror)
        return self.mirror.rstrip("/") if self.mirror and remote else None

    @property
    def folder(self) -> Path | None:
        """The mirror if it is a folder; raises :class:`UserError` if it does not exist."""
        if self.mirror is None or self.endpoint is not None:
            return None
        folder = Path(self.mirror).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"--mirror {self.mirror}: no such folder; give a folder with files at "
                "owner/name/file, or an http(s) URL"
            )
        return folder


def difference(path: Path, sha256: str | None, want: Expected) -> str | None:
    """What is wrong with a file, or None; ``sha256`` is its hash, or None if not known.

    If no hash is stated, the name of the cached blob counts: the SHA-256 for large files, git's
    hash for small ones.
    """
    size = path.stat().st_size
    if want.size is not None and size < want.size:
        return f"truncated: {size} of {want.size} bytes"
    if want.size is not None and size > want.size:
        return f"altered: {size} bytes, expected {want.size}"
    if sha256 is None:
        return None
    name = cache.blob(path).name
    stated = want.sha256 or (name if re.match(SHA256, name) else sha256)
    if sha256 != stated:
        return f"altered: SHA-256 is {sha256[:12]}…, expected {stated[:12]}…"
    if want.sha256 is None and re.match(COMMIT, name) and name != _git_hash(path):
        return f"altered: its content does not match its blob name {name[:12]}…"
    return None


def _git_hash(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: digest).hexdigest()


# --- weights fetch --------------------------------------------------------------------------------


def fetch(artifact: Artifact, lock: Lock, options: FetchOptions) -> list[Path]:
    """Fetches the files of ``artifact`` that are not intact in the cache; returns all paths.

    Raises:
        UserError: a file cannot be fetched, or is not the one in the catalogue or the lock; one
            line that names it.
    """
    lock = Lock() if options.newest else lock
    return [_fetch_file(artifact, file, lock, options) for file in artifact.files]


def _fetch_file(artifact: Artifact, file: PublishedFile, lock: Lock, options: FetchOptions) -> Path:
    want, folder, digests = expected(artifact, file, lock), options.folder, cache.Digests()
    label = f"{artifact.name}: {file.path}"
    offline = folder is None and (options.offline or constants.HF_HUB_OFFLINE)
    ask = options.newest and want.revision is None
    path = None if ask else cache.find(artifact, file, want.revision)
    if path is not None:
        problem = difference(path, digests.of(path), want)
        if problem is None:
            options.report(f"{label}: cached")
            return path
        if offline:
            raise UserError(f"{label} is {problem}; fetch it again with network access")
        options.report(f"{label}: {problem}; fetching it again")
    elif offline:
        raise UserError(
            f"{label} is not in the cache, and offline mode is on (--offline or HF_HUB_OFFLINE); "
            "leave it out, or give a folder with --mirror"
        )
    source = folder and folder / artifact.repo / file.path
    wanted = Wanted(
        f"{label} of {artifact.key}" + (f" at {want.revision}" if want.revision else ""),
        artifact.page,
        "fetch it from elsewhere with --mirror",
        options.mirror or (RAW_GITHUB if artifact.kind == "github" else constants.ENDPOINT),
        cache.repository_folder(artifact),
    )
    with one_line(wanted):
        if path is not None:
            cache.remove(path)
        if source is not None:
            path = _copy(artifact, file, want.revision, source)
        elif artifact.kind == "github":
            path = _from_github(artifact, file, want.revision, options.endpoint)
        else:
            path = _from_hub(artifact, file, want.revision, options.endpoint)
        sha256 = digests.measure(path)
        problem = difference(path, sha256, want)
        if problem is not None:
            cache.remove(path)
            again = f"replace {source}" if source else "fetch it again, or elsewhere with --mirror"
            raise UserError(
                f"{label} is {problem}; the download was deleted: {again}; if the publisher "
                "changed it, remove its entry from the lock file"
            )
    options.report(f"{label}: fetched, SHA-256 {sha256[:12]}…")
    return path


def _from_hub(
    artifact: Artifact, file: PublishedFile, revision: str | None, endpoint: str | None
) -> Path:
    token = False if endpoint else None  # only for the hub itself
    repo, kind = artifact.repo, artifact.kind
    # If the server does not respond, hf_hub_download may return an older cached file or retry for
    # long. So ask first.
    url = hf_hub_url(repo, file.path, repo_type=kind, revision=revision, endpoint=endpoint)
    get_hf_file_metadata(url, token=token, endpoint=endpoint)
    _remove_abandoned(cache.repository_folder(artifact))
    return Path(
        hf_hub_download(
            repo, file.path, repo_type=kind, revision=revision, endpoint=endpoint, token=token
        )
    )


def _remove_abandoned(folder: Path) -> None:
    """Deletes partial downloads of killed processes, which huggingface_hub does not resume."""
    for part in folder.glob("blobs/*.incomplete"):
        with suppress(OSError):  # another process or user owns it
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


def _from_github(
    artifact: Artifact, file: PublishedFile, revision: str | None, endpoint: str | None
) -> Path:
    base = f"{endpoint}/raw" if endpoint else RAW_GITHUB
    path = cache.place_of(artifact, file, revision)
    url = f"{base}/{artifact.repo}/{revision or 'HEAD'}/{file.path}"
    with atomic_path(path) as part, part.open("wb") as handle:
        http_get(url, handle, headers={"Accept-Encoding": "identity"})
    return path


def _copy(artifact: Artifact, file: PublishedFile, revision: str | None, source: Path) -> Path:
    if not source.is_file():
        raise UserError(
            f"{artifact.name}: {file.path}: no such file in the mirror: {source}; copy it there"
        )
    path = cache.place_of(artifact, file, revision)
    with atomic_path(path) as part:
        shutil.copyfile(source, part)
    if artifact.kind != "github" and revision is None:
        main = cache.repository_folder(artifact) / "refs" / constants.DEFAULT_REVISION
        atomic_write_text(main, cache.MIRROR_SNAPSHOT)
    return path


# --- loaders --------------------------------------------------------------------------------------


def fetched_file(name: str) -> Path:
    """The only file of the reward's artifact ``name``, which must have been fetched.

    Raises:
        UserError: it is not in the cache, or not the one in the catalogue or the lock file.
    """
    (artifact,) = catalogue().select([name], ("reward",))
    (file,) = artifact.files
    want = expected(artifact, file, read_lock())
    path = cache.find(artifact, file, want.revision)
    if path is None:
        raise UserError(f"{name} is not in the cache; run `g2rpo weights fetch {name}`")
    problem = difference(path, sha256_file(path), want)
    if problem is not None:
        raise UserError(f"{name} is {problem}; run `g2rpo weights fetch {name}`")
    return path


def fetch_first(repo: str, names: Sequence[str], revision: str | None) -> Path:
    """The first of ``names`` in the Hugging Face model ``repo``, fetched if not cached.

    ``revision`` None is the one pinned by the catalogue or the lock file.

    Raises:
        UserError: the model has none of them, or they cannot be fetched, or the file is not the
            one in the catalogue or the lock file.
    """
    pinned = revision or revision_of(repo)
    with one_line(_wanted(f"cannot fetch {' or '.join(names)} of {repo}", repo, revision)):
        for name in names:
            try:
                path = Path(hf_hub_download(repo, name, revision=pinned))
                break
            except EntryNotFoundError:
                if name == names[-1]:
                    raise
    check_cached(path, repo, name, pinned)
    return path


def fetch_snapshot(
    repo: str, patterns: Sequence[str], revision: str | None, section: str = ""
) -> Path:
    """Fetches the files of a Hugging Face model that match ``patterns``; returns the snapshot.

    Skips weights in other formats than safetensors. ``revision`` None is the one pinned by the
    catalogue or the lock file. ``section`` is where the configuration names the model, for
    messages.

    Raises:
        UserError: it cannot be fetched, or a file is not the one in the catalogue or the lock file.
    """
    pinned = revision or revision_of(repo)
    what = f"{section} source {repo!r}" if section else f"cannot fetch {repo}"
    with one_line(_wanted(what, repo, revision, section)):
        folder = Path(
            snapshot_download(
                repo,
                revision=pinned,
                allow_patterns=list(patterns),
                ignore_patterns=OTHER_FORMATS,
            )
        )
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and any(fnmatch(name, pattern) for pattern in patterns):
            check_cached(path, repo, name, pinned)
    return folder


def _wanted(what: str, repo: str, revision: str | None, section: str = "") -> Wanted:
    inside = f"{section}." if section else ""
    if revision is not None:
        what += f" at {inside}revision {revision!r}"
    elif (pinned := revision_of(repo)) is not None:
        what += f" at the locked revision {pinned[:12]}"
    ours = f"`g2rpo weights fetch {repo}` or " if catalogue().of_repository(repo) else ""
    otherwise = (
        f"run {ours}`hf download {repo}` with network access, or set `{inside}source` to a folder "
        "with the model"
    )
    return Wanted(what, f"https://huggingface.co/{repo}", otherwise)


def check_cached(path: Path, repo: str, name: str, revision: str | None) -> None:
    """Checks the size and, if stated, the hash of a cached file before it is loaded.

    Only files of the pinned revision are checked. Hashes are remembered (:class:`cache.Digests`).

    Raises:
        UserError: it is not the file in the catalogue or the lock.
    """
    want = expected_of(repo, name)
    if revision != want.revision:
        return
    problem = difference(path, None, want)
    if problem is None and want.sha256 is not None:
        problem = difference(path, cache.Digests().of(path), want)
    if problem is not None:
        raise UserError(f"{repo} {name} is {problem}; run `g2rpo weights fetch {repo}` to fix it")
