"""The client of all reward servers.

``openai``'s client sends the requests, whatever the API: it retries transient failures with
exponential backoff and respects ``Retry-After``.
"""

import asyncio
import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, TypeVar

import anyio
import httpx2
import openai
from anyio.from_thread import start_blocking_portal
from PIL import Image
from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.rewards.server import ServerConfig, read_key
from g2rpo.text import excerpt

_RETRIED = {408, 409, 429}
"""Statuses below 500 that the client retries."""
SHORTEST_KEY = 8
"""Answers are searched for keys of at least this many characters."""
Question = TypeVar("Question")
Answer = TypeVar("Answer")


class _Attempts(openai.DefaultAsyncHttpxClient):
    """Limits a whole attempt to the timeout: httpx has one for each read, and a reply has many."""

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            with anyio.fail_after(self.timeout.read):
                return await super().send(request, **options)
        except TimeoutError:
            raise httpx2.ReadTimeout("the attempt takes too long", request=request) from None


class ServerClient(ABC):
    """Asks a server several questions at a time; an error is one line that begins with its URL.

    Attributes:
        headers: to be sent with every request.
    """

    too_large: ClassVar[str]
    """The fix where a request is too large for the server."""

    def __init__(self, config: ServerConfig, section: str) -> None:
        """For the server in ``section`` of the configuration.

        Raises:
            UserError: the environment variable with the key is not set.
        """
        self.config, self.section = config, section
        self._key = read_key(config.api_key_env, f"{section}.api_key_env")
        self.headers = {} if self._key else {"Authorization": openai.Omit()}

    def ask_all(
        self,
        ask: Callable[[openai.AsyncOpenAI, Question], Awaitable[Answer]],
        questions: Sequence[Question],
    ) -> list[Answer]:
        """The answers in order; the first failure cancels the remaining questions.

        Raises:
            UserError: a question has no answer; never shows the key.
        """
        try:
            # An event loop in its own thread: the caller may be running one, as notebooks do.
            with start_blocking_portal() as portal:
                return portal.call(self._ask_all, ask, questions)
        except UserError as error:
            message = self.masked(str(error))
        # Outside the handler, so that no error with the key is the context.
        raise UserError(message)

    async def _ask_all(
        self,
        ask: Callable[[openai.AsyncOpenAI, Question], Awaitable[Answer]],
        questions: Sequence[Question],
    ) -> list[Answer]:
        free = asyncio.Semaphore(self.config.concurrency)

        async def one(question: Question) -> Answer:
            async with free:
                return await ask(client, question)

        async with self._client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(question)) for question in questions]
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self.config.api(),
            api_key=self._key or "none",  # with None, openai would send $OPENAI_API_KEY
            timeout=self.config.timeout_seconds,
            max_retries=self.config.retries,
            http_client=_Attempts(timeout=self.config.timeout_seconds, follow_redirects=False),
        )

    async def reply(self, client: openai.AsyncOpenAI, request: Awaitable[Answer]) -> Answer | None:
        """The reply to a request of ``client``; None if it is not valid JSON.

        Raises:
            UserError: there is none, after the retries; says why, and the fix.
        """
        failure: openai.APIError
        try:
            return await request
        except openai.APIError as error:
            failure = error
        except (ValueError, RecursionError):  # not valid JSON, or nested without end
            return None
        # Outside the handler, as in ask_all.
        raise UserError(f"{self.config.url}: {await self._reason(client, failure)}")

    async def _reason(self, client: openai.AsyncOpenAI, error: openai.APIError) -> str:
        """Why there is no answer, and the fix."""
        if isinstance(error, openai.APITimeoutError):
            reason = f"timed out after {self.config.timeout_seconds:g} s"
        elif not isinstance(error, openai.APIStatusError):
            reason = f"connection failed ({error.__cause__})"
        else:
            status = error.status_code
            reason = f"HTTP {status}: {excerpt(self.masked(error.response.text))}"
            if status in (401, 403):
                variable = self.config.api_key_env
                fix = (
                    "put the key in an environment variable and name it in api_key_env"
                    if variable is None
                    else f"the key in ${variable} was rejected"
                )
                return f"HTTP {status}, the server requires a key; {fix}"
            if status == 404:
                return f"HTTP 404{await self.not_found(client)}"
            if status < 400:
                return (
                    f"HTTP {status}, the server redirects{_target(error.response)}; set "
                    f"{self.section}.url to the root of the server that answers"
                )
            if status == 413:
                return f"{reason}; {self.too_large}"
            if status < 500 and status not in _RETRIED:
                return reason
        return (
            f"no answer after {self.config.retries + 1} attempts: {reason}; check that the server "
            f"is running, or raise {self.section}.retries or timeout_seconds"
        )

    @abstractmethod
    async def not_found(self, client: openai.AsyncOpenAI) -> str:
        """What HTTP 404 means and the fix, to follow on ``HTTP 404``."""

    def contains_key(self, text: str) -> bool:
        """Whether ``text`` shows the key; a key of a few letters may be there by chance."""
        key = self._key
        return key is not None and len(key) >= SHORTEST_KEY and key in text

    def masked(self, text: str) -> str:
        """``text`` of the server with the key masked."""
        return text.replace(self._key, "***") if self._key else text


def _target(response: httpx2.Response) -> str:
    """Where ``response`` redirects to: host and path, since a query may have secrets."""
    if response.next_request is None:
        return ""
    url = response.next_request.url
    return f" to {(url.netloc + url.raw_path.partition(b'?')[0]).decode()}"


def png_base64(image: Tensor) -> str:
    """A uint8 image ``[H, W, 3]`` as a PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, format="PNG", compress_level=1)  # fast
    return base64.b64encode(buffer.getvalue()).decode()
