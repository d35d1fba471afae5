"""An HTTP server on the loopback that answers, or fails, as a test says."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SOON = {"Retry-After-Ms": "1"}


@dataclass
class Reply:
    """What the server says to one request."""

    status: int = 200
    body: str | bytes = ""
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    drip: float = 0.0
    """Seconds after each byte of the body."""
    hang_up: bool = False


class FakeServer:
    """``answer`` decides what it says to a POST, ``pages`` to a GET."""

    def __init__(self, path: str, answer: Callable[[dict[str, Any], int], Reply]) -> None:
        self.path, self.answer = path, answer
        self.pages: dict[str, Reply] = {}
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

            def do_GET(self) -> None:
                self.send(outer.pages.get(self.path, Reply(404, "no such page")))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append(body)
                    outer.authorizations.append(self.headers["Authorization"])
                    number = len(outer.requests)
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                reply = outer.answer(body, number)
                if self.path != outer.path:
                    reply = Reply(404, "no such page")
                time.sleep(reply.wait)
                with outer.lock:
                    outer.now -= 1
                self.send(reply)

            def send(self, reply: Reply) -> None:
                data = reply.body.encode() if isinstance(reply.body, str) else reply.body
                if reply.hang_up:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                try:
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    size = 1 if reply.drip else max(1, len(data))
                    for start in range(0, len(data), size):
                        self.wfile.write(data[start : start + size])
                        time.sleep(reply.drip)
                except OSError:  # the client has given up waiting
                    self.close_connection = True

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def sequence(self, *replies: Reply) -> None:
        """The replies in turn, the last of them for ever."""
        self.answer = lambda body, number: replies[min(number, len(replies)) - 1]

    @contextmanager
    def running(self) -> Iterator["FakeServer"]:
        """It answers within the block."""
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        yield self
        self.http.shutdown()
        self.http.server_close()


def unused_url() -> str:
    """An address at which nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"
