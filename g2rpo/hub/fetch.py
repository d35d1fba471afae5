"""Fetching, from the hub, another server or a folder; what is not whole is refused.

huggingface_hub downloads: into a file of another name until all bytes are there, so that a process
that is killed leaves nothing that a loader takes for whole. What it fetched is compared here with
what the catalogue or the lock file states.
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
from g2rpo.files import atomic_path, atomic_write_text
from g2rpo.hub import cache
from g2rpo.hub.catalogue import COMMIT, SHA256, Artifact, PublishedFile, catalogue
from g2rpo.hub.errors import Wanted, one_line
from g2rpo.hub.lock import Expected, Lock, expected, expected_of, revision_of

ABANDONED = 3600
"""Seconds without a byte after which a download is taken for killed."""
RAW_GITHUB = "https://raw.githubusercontent.com"
OTHER_FORMATS = ["*.bin", "*.msgpack", "*.onnx", "*.onnx_data", "*.h5"]
"""The same weights again, in formats that are not read."""


@dataclass(frozen=True)
class FetchOptions:
    """Where to fetch from."""

    mirror: str | None = None
    """Address of a hub-compatible server, or a folder laid out ``owner/name/file``."""
    offline: bool = False
    """Never use the network; a mirror folder is no network."""
    newest: bool = False
    """Ask for the newest revision, whatever is cached or locked."""
    tell: Callable[[str], None] = lambda _: None
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
    """What is wrong with a file, or None; ``sha256`` is its hash, None where not known.

    Where no hash is stated, the name of its content in the cache counts: the hub names large files
    by their SHA-256 and small ones as git does.
    """
    size = path.stat().st_size
    if want.size is not None and size < want.size:
        return f"truncated: {size} of {want.size} bytes"
    if want.size is not None and size > want.size:
        return f"altered: {size} bytes where {want.size} are expected"
    if sha256 is None:
        return None
    name = cache.blob(path).name
    stated = want.sha256 or (name if re.match(SHA256, name) else sha256)
    if sha256 != stated:
        return f"altered: its SHA-256 is {sha256[:12]}… where {stated[:12]}… is expected"
    if want.sha256 is None and re.match(COMMIT, name) and name != _git_hash(path):
        return f"altered: its content is not what its name {name[:12]}… says"
    return None


def _git_hash(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: digest).hexdigest()


# --- weights fetch --------------------------------------------------------------------------------


def fetch(artifact: Artifact, lock: Lock, options: FetchOptions) -> list[Path]:
    """Fetches the files of ``artifact`` that are not cached whole, and gives all their paths.

    Raises:
        UserError: a file cannot be had, or is not what the catalogue or the lock says; one line
            that names it.
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
        problem = difference(path, digests.known(path) or digests.measure(path), want)
        if problem is None:
            options.tell(f"{label}: cached")
            return path
        if offline:
            raise UserError(f"{label} is {problem}; fetch it again where there is a network")
        options.tell(f"{label}: {problem}; fetching it again")
    elif offline:
        raise UserError(
            f"{label} is not in the cache and offline mode is on (--offline or HF_HUB_OFFLINE); "
            "leave it out, or give --mirror with a folder"
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
                f"{label} is {problem}; what came was deleted: {again}; if it was changed on "
                "purpose, delete its entry in the lock file"
            )
    options.tell(f"{label}: fetched, SHA-256 {sha256[:12]}…")
    return path


def _from_hub(
    artifact: Artifact, file: PublishedFile, revision: str | None, endpoint: str | None
) -> Path:
    token = False if endpoint else None  # it belongs to the hub alone
    repo, kind = artifact.repo, artifact.kind
    # Where the server cannot be asked, hf_hub_download may give an older cached file, or try for
    # long: so it is asked here first.
    url = hf_hub_url(repo, file.path, repo_type=kind, revision=revision, endpoint=endpoint)
    get_hf_file_metadata(url, token=token, endpoint=endpoint)
    _remove_abandoned(cache.repository_folder(artifact))
    return Path(
        hf_hub_download(
            repo, file.path, repo_type=kind, revision=revision, endpoint=endpoint, token=token
        )
    )


def _remove_abandoned(folder: Path) -> None:
    """Deletes what killed downloads left: huggingface_hub does not continue them."""
    for part in folder.glob("blobs/*.incomplete"):
        with suppress(OSError):  # another process's, or another user's
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
            f"{artifact.name}: {file.path}: the mirror has no {source}; copy the file there"
        )
    path = cache.place_of(artifact, file, revision)
    with atomic_path(path) as part:
        shutil.copyfile(source, part)
    if artifact.kind != "github" and revision is None:
        main = cache.repository_folder(artifact) / "refs" / constants.DEFAULT_REVISION
        atomic_write_text(main, cache.MIRROR_SNAPSHOT)
    return path


# --- loaders --------------------------------------------------------------------------------------


def fetch_first(repo: str, names: Sequence[str], revision: str | None) -> Path:
    """The first of ``names`` that the Hugging Face model ``repo`` has, fetched if need be.

    ``revision`` None is what the catalogue or the lock file pins.

    Raises:
        UserError: it has none of them, they cannot be had, or one is not the file that the
            catalogue or the lock file states.
    """
    pinned = revision or revision_of(repo)
    with one_line(_wanted(f"cannot get {' or '.join(names)} of {repo}", repo, revision)):
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
    """The cached snapshot of a Hugging Face model, with its files that match ``patterns`` fetched.

    Other formats of weights than safetensors are left out. ``revision`` None is what the catalogue
    or the lock file pins; ``section`` of the configuration names the model, for messages.

    Raises:
        UserError: it cannot be had, or a file is not what the catalogue or the lock file states.
    """
    pinned = revision or revision_of(repo)
    what = f"{section} source {repo!r}" if section else f"cannot get {repo}"
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
        f"run {ours}`hf download {repo}` where there is a network, or point `{inside}source` at a "
        "folder that holds it"
    )
    return Wanted(what, f"https://huggingface.co/{repo}", otherwise)


def check_cached(path: Path, repo: str, name: str, revision: str | None) -> None:
    """Checks a cached file of a hub model before it is loaded.

    Its size is compared, and its hash where one is stated; the file is read for that once
    (:class:`cache.Digests`). A revision other than the pinned one is not checked.

    Raises:
        UserError: it is not the file that the catalogue or the lock states.
    """
    want = expected_of(repo, name)
    if revision != want.revision:
        return
    problem = difference(path, None, want)
    if problem is None and want.sha256 is not None:
        digests = cache.Digests()
        problem = difference(path, digests.known(path) or digests.measure(path), want)
    if problem is not None:
        raise UserError(f"{repo} {name} is {problem}; run `g2rpo weights fetch {repo}` to fix it")
