"""Downloading one file over HTTP so that it can be gone on with, by this process or another.

huggingface_hub answers what a file is (address, size, content name) and gives the HTTP client with
its proxies, certificates and offline mode. Its own downloader starts again from the first byte when
a process was killed; the bytes here stay in a part file.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast
from urllib.parse import urlsplit

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_session,
    get_token,
    hf_hub_url,
    hf_raise_for_status,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from g2rpo.errors import UserError
from g2rpo.hub.catalogue import Artifact, PublishedFile
from g2rpo.progress import ProgressReport

# The base of all errors of the HTTP library (httpx or its successor) that huggingface_hub uses.
TRANSPORT_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
RAW_GITHUB = "https://raw.githubusercontent.com"
ATTEMPTS = 5
"""How often in a row a connection may fail without one more byte."""
WAIT = 1.0
"""Seconds between attempts."""
SHOWN = 10_000_000
"""Bytes still to come from which on progress is shown."""
TIMEOUT = 30.0
"""Seconds without an answer or a byte after which a connection counts as cut."""


@dataclass(frozen=True)
class Remote:
    """A file on a server: address, headers, and what the server says of it."""

    url: str
    headers: dict[str, str]
    name: str
    """Stands for the exact content: the ETag of a hub, else the address."""
    commit: str | None = None
    size: int | None = None


def login_hint(artifact: Artifact) -> str:
    """How to get access to a gated repository."""
    return (
        f"accept its licence on {artifact.page}, then log in with `hf auth login` "
        "(or set HF_TOKEN) and run the same command again"
    )


def explain(
    error: Exception, artifact: Artifact, file: PublishedFile, where: str | None
) -> NoReturn:
    """Turns an error of the network or the hub into one line.

    Raises:
        UserError: always.
    """
    what = f"{artifact.name}: {file.path} of {artifact.key}"
    server = where or "the hub"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, GatedRepoError) or (status in (401, 403) and artifact.gated):
        message = f"{what} is gated: {login_hint(artifact)}"
    elif isinstance(error, OfflineModeIsEnabled):
        message = (
            f"{what} is not in the cache and offline mode is on; "
            "unset HF_HUB_OFFLINE, or fetch it with --mirror from a folder"
        )
    elif isinstance(error, RevisionNotFoundError):
        message = f"{what}: {server} has no such revision; see {artifact.page}"
    elif isinstance(error, EntryNotFoundError) or (status == 404 and artifact.kind == "github"):
        message = f"{what}: {server} has no such file (404); see {artifact.page}"
    elif isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        message = (
            f"{what}: {server} refuses it or has no such repository ({status}); see "
            f"{artifact.page}, and log in with `hf auth login` if it is private"
        )
    elif isinstance(error, FileMetadataError):
        message = f"{what}: {server} does not answer like a model hub ({reason})"
    elif status is not None:
        message = f"{what}: {server} answers with an error ({reason}); try again later"
    elif isinstance(error, TRANSPORT_ERROR):
        message = (
            f"{what}: {server} cannot be reached ({reason}); check the network, or give "
            "--mirror; what is there already is kept"
        )
    else:
        raise error
    raise UserError(" ".join(message.split())) from None


def describe(
    artifact: Artifact, file: PublishedFile, revision: str | None, endpoint: str | None
) -> Remote:
    """Asks the server what ``file`` is.

    ``endpoint``: another server than the hub; no token is sent to it.

    Raises:
        UserError: it cannot be reached, refuses, or has no such file.
    """
    if artifact.kind == "github":
        base = f"{endpoint}/raw" if endpoint else RAW_GITHUB
        commit = revision or "HEAD"
        url = f"{base}/{artifact.repo}/{commit}/{file.path}"
        return Remote(url, {}, url, commit=commit, size=file.size)
    token = False if endpoint else None
    url = hf_hub_url(
        artifact.repo, file.path, repo_type=artifact.kind, revision=revision, endpoint=endpoint
    )
    try:
        answer = get_hf_file_metadata(url, token=token, timeout=TIMEOUT, endpoint=endpoint)
        if answer.commit_hash is None or answer.etag is None:
            raise FileMetadataError("no commit or no ETag in its answer")
    except (HfHubHTTPError, FileMetadataError, OfflineModeIsEnabled, TRANSPORT_ERROR) as error:
        explain(error, artifact, file, endpoint)
    # Each connection asks the hub itself and follows its redirection: signed addresses run out, and
    # the HTTP client does not hand the token on to another host.
    url = hf_hub_url(
        artifact.repo,
        file.path,
        repo_type=artifact.kind,
        revision=answer.commit_hash,
        endpoint=endpoint,
    )
    secret = None if endpoint or constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
    return Remote(url, headers, answer.etag, answer.commit_hash, answer.size)


def check_space(label: str, folder: Path, needed: int) -> None:
    """Raises :class:`UserError` where the disk of ``folder`` has fewer than ``needed`` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        detail = f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        disk_full(label, folder, detail)


def disk_full(label: str, folder: Path, detail: str) -> NoReturn:
    """Raises :class:`UserError` that says so and how to mend it."""
    raise UserError(
        f"{label}: the disk of {folder} is full ({detail}); free some space or set HF_HOME to "
        "another disk, then run the same command to go on"
    )


def _receive(remote: Remote, part: Path, report: ProgressReport) -> None:
    """One connection: appends to ``part`` what it lacks."""
    start = part.stat().st_size if part.exists() else 0
    headers = {**remote.headers, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream("GET", remote.url, headers=headers, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # more is there than the server has
            part.unlink()
            return
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # the server gives the whole file again
            start = 0
        with part.open("ab" if start else "wb", buffering=0) as handle:
            for chunk in response.iter_bytes():
                handle.write(chunk)
                start += len(chunk)
                report.update(start // 10**6)


def download(remote: Remote, part: Path, artifact: Artifact, file: PublishedFile) -> None:
    """Brings ``part`` to the whole file, going on from the bytes that it has.

    Raises:
        UserError: the server refuses, the connection is cut again and again, or the disk is full;
            the bytes that came are kept.
    """
    label = f"{artifact.name}: {file.path}"
    have = part.stat().st_size if part.exists() else 0
    if remote.size is not None and have > remote.size:
        part.unlink()
        have = 0
    check_space(label, part.parent, (remote.size or 0) - have)
    failures, best = 0, have
    total = (remote.size or 0) // 10**6
    shown = remote.size is None or remote.size - have > SHOWN
    with ProgressReport(f"{label}, MB", total, done=have // 10**6, enabled=shown) as report:
        while not part.exists() or remote.size is None or have < remote.size:
            cut: Exception | None = None
            try:
                _receive(remote, part, report)
            except (HfHubHTTPError, OfflineModeIsEnabled) as error:
                explain(error, artifact, file, remote.url.split("?")[0])
            except TRANSPORT_ERROR as error:
                cut = error
            if cut is None and remote.size is None:
                return
            have = part.stat().st_size if part.exists() else 0
            failures = 0 if have > best else failures + 1
            best = max(best, have)
            if failures > ATTEMPTS:
                if cut is not None and not have:
                    explain(cut, artifact, file, urlsplit(remote.url).netloc)
                reason = str(cut) if cut is not None else "the server ends too early"
                raise UserError(
                    f"{label}: the connection was cut after {have} of {remote.size or 'all'} bytes "
                    f"({reason}); run the same command to go on from there"
                )
            if remote.size is None or have < remote.size:
                time.sleep(WAIT)
