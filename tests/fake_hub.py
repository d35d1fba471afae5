"""A model hub on loopback: what huggingface_hub needs of its protocol, and faults on demand."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from g2rpo.hub.cache import CACHE_VARIABLE
from g2rpo.hub.lock import LOCK_VARIABLE

COMMIT = "c" * 40


@dataclass
class Request:
    """What the server was asked for, and how many bytes of content it sent."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    sent: int = 0


@dataclass
class FakeHub:
    """The repositories of the server and how it misbehaves; ``files``: path in URL -> content."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    small: set[str] = field(default_factory=set)
    """Files that are named as git names them, not by SHA-256."""
    absent: set[str] = field(default_factory=set)
    """Commits that no repository has; it has all others."""
    gated: dict[str, int] = field(default_factory=dict)
    """Repository -> status of the refusal."""
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which each of the next downloads is cut."""
    sends: dict[str, bytes] = field(default_factory=dict)
    """What is sent instead of a file's content."""
    broken: bool = False
    """Whether every request is an error of the server."""
    headers: bool = True
    """Whether files are answered with their commit, as only a model hub does."""
    redirect: str | None = None
    """Address of another server that the content is on."""
    log: list[Request] = field(default_factory=list)
    address: str = ""

    def add(self, repo: str, path: str, content: bytes, commit: str = COMMIT) -> None:
        """Publishes a file."""
        self.files[f"{repo}/{path}"] = content
        self.commits[repo] = commit

    def downloads(self) -> list[Request]:
        """The requests for content, in order."""
        return [request for request in self.log if request.method == "GET"]

    def sent(self) -> int:
        """Bytes of content sent in all."""
        return sum(request.sent for request in self.log)


def _etag(hub: FakeHub, name: str, content: bytes) -> str:
    if name in hub.small:
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        """Says nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _refuse(self, status: int, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, *, with_content: bool) -> None:
        headers = self.headers
        request = Request(
            self.command, self.path, headers.get("Range"), headers.get("Authorization")
        )
        self.hub.log.append(request)
        # raw/REPO/COMMIT/FILE, [datasets/]REPO/resolve/COMMIT/FILE, api/models/REPO/WHAT/COMMIT
        parts = unquote(urlsplit(self.path).path).removeprefix("/api").lstrip("/").split("/")
        raw = parts[0] == "raw"
        parts = parts[1:] if parts[0] in ("raw", "datasets", "models") else parts
        repo, parts = "/".join(parts[:2]), parts[2:] if raw else parts[3:]
        hub, name = self.hub, "/".join([repo, *parts[1:]])
        commit = "".join(parts[:1])  # huggingface_hub also asks for things that are no files
        commit = hub.commits.get(repo, "") if commit in ("main", "HEAD") else commit
        if hub.broken:
            self._refuse(500)
        elif repo in hub.gated:
            self._refuse(hub.gated[repo], "GatedRepo")
        elif repo not in hub.commits:
            self._refuse(401, "RepoNotFound")
        elif len(commit) != 40 or commit in hub.absent:
            self._refuse(404, "" if raw else "RevisionNotFound")
        elif self.path.startswith("/api/"):
            self._describe(repo, commit, tree="/tree/" in self.path)
        elif name not in hub.files:
            self._refuse(404, "" if raw else "EntryNotFound")
        else:
            self._send(request, name, hub.files[name], commit, with_content)

    def _describe(self, repo: str, commit: str, *, tree: bool) -> None:
        listing = [
            {"type": "file", "path": name[len(repo) + 1 :], "size": len(content), "oid": "a" * 40}
            for name, content in self.hub.files.items()
            if name.startswith(f"{repo}/")
        ]
        body = json.dumps(listing if tree else {"id": repo, "sha": commit}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(
        self, request: Request, name: str, content: bytes, commit: str, with_content: bool
    ) -> None:
        etag = _etag(self.hub, name, content)
        if self.hub.redirect is not None:
            self.send_response(302)
            self.send_header("Location", self.hub.redirect + self.path)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-ETag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        body = self.hub.sends.get(name, content) if with_content else content
        start = int(request.range.removeprefix("bytes=").rstrip("-")) if request.range else 0
        if start and start >= len(body):
            return self._refuse(416)
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag}"')
        if self.hub.headers:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        body = body[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_content:
            return None
        cut = self.hub.cut_after.pop(0) if self.hub.cut_after else len(body)
        if cut < len(body):
            self.close_connection = True
        for position in range(0, min(cut, len(body)), 1 << 16):
            piece = body[position : min(position + (1 << 16), cut)]
            try:
                self.wfile.write(piece)
            except OSError:  # the other side is gone
                return None
            request.sent += len(piece)
        return None


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A running hub without repositories."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use_empty_caches(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Points all caches and the lock file into ``folder``; gives the Hugging Face cache."""
    from huggingface_hub import constants

    cache = folder / "hf" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "own"))
    monkeypatch.setenv(LOCK_VARIABLE, str(folder / "lock.json"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "G2RPO_MIRROR", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return cache
