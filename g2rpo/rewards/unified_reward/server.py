"""Questions to an OpenAI-compatible server, such as vLLM, over HTTP."""

import base64
import io
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import requests
from PIL import Image
from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.rewards.unified_reward.answers import excerpt
from g2rpo.rewards.unified_reward.config import ServerConfig

FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0
"""Seconds between tries: doubled each time from the first, never above the longest."""
_AGAIN = {408, 409, 429}


@dataclass(frozen=True)
class ServerQuestion:
    """One question: its text, and the image as the bytes of a PNG."""

    text: str
    png: bytes


class _TransientError(Exception):
    """A try failed in a way that another may not."""

    def __init__(self, reason: str, delay: float | None = None) -> None:
        super().__init__(reason)
        self.delay = delay


class _Key(requests.auth.AuthBase):
    """Sends the key, if any; being there, it also keeps requests from reading ~/.netrc."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class ServerModel:
    """Asks a server, several questions at a time, each as often as the configuration allows."""

    def __init__(
        self, config: ServerConfig, max_answer_tokens: int, accept: Callable[[str], bool]
    ) -> None:
        """Args:
            config: the server.
            max_answer_tokens: bound of an answer's length.
            accept: whether an answer is well-formed; one that is not is asked for once more,
                since servers batch by load and so do not always repeat an answer.

        Raises:
            UserError: the environment variable of the key is not set.
        """
        self.config = config
        self.model = config.model
        self.weights_hash = f"server:{config.model}"
        self.settings: dict[str, Any] = {
            "backend": "server",
            "temperature": 0,
            "max_answer_tokens": max_answer_tokens,
        }
        self._accept = accept
        self._key = _read_key(config.api_key_env)
        self._auth = _Key(self._key)
        self._random = secrets.SystemRandom()

    def prepare(self, images: Sequence[Tensor], questions: Sequence[str]) -> list[ServerQuestion]:
        """See :meth:`Backend.prepare`."""
        pairs = zip(questions, images, strict=True)
        return [ServerQuestion(question, png_bytes(image)) for question, image in pairs]

    def ask(self, inputs: Sequence[ServerQuestion]) -> list[str]:
        """See :meth:`Backend.ask`; the first failure ends all questions."""
        if not inputs:
            return []
        local, stop, sessions = threading.local(), threading.Event(), list[requests.Session]()

        def one(question: ServerQuestion) -> str:
            if not hasattr(local, "session"):  # a session is for one thread
                local.session = requests.Session()
                sessions.append(local.session)
            return self._answer(local.session, question, stop)

        workers = ThreadPoolExecutor(min(self.config.concurrency, len(inputs)), "ask")
        try:
            futures = [workers.submit(one, question) for question in inputs]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        finally:
            # Without waiting: a failure is told at once, whatever other questions hang on.
            stop.set()
            workers.shutdown(wait=False, cancel_futures=True)
            for session in sessions:
                session.close()

    def _answer(
        self, session: requests.Session, question: ServerQuestion, stop: threading.Event
    ) -> str:
        url = f"data:image/png;base64,{base64.b64encode(question.png).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": question.text},
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.settings["temperature"],
            "max_tokens": self.settings["max_answer_tokens"],
        }
        answer = self._post(session, body, stop)
        return answer if self._accept(answer) else self._post(session, body, stop)

    def _post(self, session: requests.Session, body: dict[str, Any], stop: threading.Event) -> str:
        """The answer to one request, tried again after failures that may pass."""
        for attempt in range(self.config.retries + 1):
            try:
                return self._try(session, body)
            except _TransientError as error:
                reason, asked = str(error), error.delay
            if attempt == self.config.retries:
                break
            delay = FIRST_DELAY * 2**attempt * self._random.uniform(0.5, 1.0)
            # The server's own wish is a lower bound, so that many clients do not come at once.
            if stop.wait(min(max(delay, asked or 0.0), LONGEST_DELAY)):
                break
        raise UserError(
            f"{self.config.url}: no answer after {attempt + 1} tries: {reason}; check that the "
            "server runs there, or raise question.server.retries or timeout_seconds"
        )

    def _try(self, session: requests.Session, body: dict[str, Any]) -> str:
        endpoint = self.config.endpoint("chat/completions")
        try:
            response = session.post(
                endpoint,
                json=body,
                auth=self._auth,
                timeout=self.config.timeout_seconds,
                allow_redirects=False,
            )
        except requests.Timeout:
            raise _TransientError(f"time-out of {self.config.timeout_seconds:g} s") from None
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            raise _TransientError("the connection was refused or broke off") from None
        except requests.RequestException as error:
            raise UserError(f"{self.config.url}: {self._clean(str(error))}") from None
        status = response.status_code
        if status in _AGAIN or status >= 500:
            delay = _retry_after(response.headers.get("Retry-After"))
            raise _TransientError(f"HTTP {status}: {self._clean(response.text)}", delay)
        if status != 200:
            raise self._refusal(session, response)
        return _content(response)

    def _refusal(self, session: requests.Session, response: requests.Response) -> UserError:
        """What a status says that no further try will change."""
        url, status, variable = self.config.url, response.status_code, self.config.api_key_env
        if status in (401, 403):
            if variable is None:
                mend = "put the key into an environment variable and name it in api_key_env"
            else:
                mend = f"it does not accept the key in ${variable}"
            return UserError(f"{url}: HTTP {status}, the server asks for a key; {mend}")
        if status == 404:
            served = self._served(session)
            if served is None:
                return UserError(
                    f"{url}: HTTP 404, no OpenAI-compatible API is there; question.server.url "
                    "must be the server's root, e.g. http://host:8000"
                )
            return UserError(
                f"{url}: HTTP 404 for the model {self.model!r}; it serves: "
                f"{', '.join(served) or 'none'}"
            )
        return UserError(f"{url}: HTTP {status}: {self._clean(response.text)}")

    def _served(self, session: requests.Session) -> list[str] | None:
        """The models that the server lists; None where it has no such list."""
        try:
            response = session.get(
                self.config.endpoint("models"),
                auth=self._auth,
                timeout=self.config.timeout_seconds,
                allow_redirects=False,
            )
            response.raise_for_status()
            return [str(entry["id"]) for entry in response.json()["data"]]
        except (requests.RequestException, ValueError, KeyError, TypeError):
            return None

    def _clean(self, text: str) -> str:
        """``text`` of the server, short and without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        return excerpt(text)


def png_bytes(image: Tensor) -> bytes:
    """A uint8 image ``[H, W, 3]`` as a PNG; lightly compressed, which is the faster."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"question.server.api_key_env: the environment has no ${variable}; set it")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"question.server.api_key_env: ${variable} holds no usable key")
    return key


def _retry_after(value: str | None) -> float | None:
    """The seconds that a Retry-After header asks for, given as seconds or as a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _content(response: requests.Response) -> str:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        # A proxy's error page or a cut-off body; the next try may reach the model.
        raise _TransientError("the response is not a chat completion")
    return content
