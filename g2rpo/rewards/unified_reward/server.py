"""A vision-language model on an OpenAI-compatible server, such as vLLM, through ``openai``.

The client retries transient failures with exponential backoff and respects ``Retry-After``.
"""

import asyncio
import base64
import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import openai
from anyio.from_thread import start_blocking_portal
from openai.types.chat import ChatCompletion, ChatCompletionUserMessageParam
from PIL import Image
from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.rewards.question import ServerConfig
from g2rpo.rewards.unified_reward.answers import excerpt

_RETRIED = {408, 409, 429}
"""Statuses below 500 that the client retries."""


class ServerModel:
    """Asks a server several questions at a time."""

    def __init__(
        self, config: ServerConfig, max_answer_tokens: int, accept: Callable[[str], bool]
    ) -> None:
        """Args:
            config: the server.
            max_answer_tokens: maximum length of an answer.
            accept: whether an answer is well-formed. If not, the question is asked once more:
                answers of servers depend on how they batch requests.

        Raises:
            UserError: the environment variable with the key is not set.
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
        self._headers = {} if self._key else {"Authorization": openai.Omit()}

    def prepare(
        self, images: Sequence[Tensor], questions: Sequence[str]
    ) -> list[ChatCompletionUserMessageParam]:
        """See :meth:`Backend.prepare`."""
        return [_message(*pair) for pair in zip(images, questions, strict=True)]

    def ask(self, inputs: Sequence[ChatCompletionUserMessageParam]) -> list[str]:
        """See :meth:`Backend.ask`; the first failure cancels the remaining questions."""
        # An event loop in its own thread: the caller may be running one, as notebooks do.
        with start_blocking_portal() as portal:
            return portal.call(self._ask_all, inputs)

    async def _ask_all(self, messages: Sequence[ChatCompletionUserMessageParam]) -> list[str]:
        free = asyncio.Semaphore(self.config.concurrency)

        async def one(message: ChatCompletionUserMessageParam) -> str:
            async with free:
                return await self._answer(client, message)

        async with self._client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(message)) for message in messages]
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self.config.api(),
            api_key=self._key or "none",  # with None, openai would send $OPENAI_API_KEY
            timeout=self.config.timeout_seconds,
            max_retries=self.config.retries,
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )

    async def _answer(
        self, client: openai.AsyncOpenAI, message: ChatCompletionUserMessageParam
    ) -> str:
        for _ in range(2):
            answer = await self._complete(client, message)
            if answer is not None and self._accept(answer):
                return answer
        if answer is None:
            raise UserError(
                f"{self.config.url}: the response is not a chat completion with text; "
                "check that question.server.url is the root of an OpenAI-compatible server"
            )
        return answer

    async def _complete(
        self, client: openai.AsyncOpenAI, message: ChatCompletionUserMessageParam
    ) -> str | None:
        """The text of one completion; None if the response has none."""
        failure: openai.APIError
        try:
            completion = await client.chat.completions.create(
                model=self.model,
                messages=[message],
                temperature=self.settings["temperature"],
                max_tokens=self.settings["max_answer_tokens"],
                extra_headers=self._headers,
            )
        except openai.APIError as error:
            failure = error
        except ValueError:  # not valid JSON
            return None
        else:
            return _text(completion)
        # Outside the handler, so that the client's error, perhaps with the key, is no context.
        raise UserError(f"{self.config.url}: {await self._reason(client, failure)}")

    async def _reason(self, client: openai.AsyncOpenAI, error: openai.APIError) -> str:
        """Why there is no answer, and the fix."""
        if isinstance(error, openai.APITimeoutError):
            reason = f"timed out after {self.config.timeout_seconds:g} s"
        elif not isinstance(error, openai.APIStatusError):
            reason = f"connection failed ({error.__cause__})"
        else:
            status = error.status_code
            reason = f"HTTP {status}: {self._clean(error.response.text)}"
            if status in (401, 403):
                variable = self.config.api_key_env
                fix = (
                    "put the key in an environment variable and name it in api_key_env"
                    if variable is None
                    else f"the key in ${variable} was rejected"
                )
                return f"HTTP {status}, the server requires a key; {fix}"
            if status == 404:
                return await self._not_found(client)
            if status < 500 and status not in _RETRIED:
                return reason
        return (
            f"no answer after {self.config.retries + 1} attempts: {reason}; check that the server "
            "is running, or raise question.server.retries or timeout_seconds"
        )

    async def _not_found(self, client: openai.AsyncOpenAI) -> str:
        try:
            models = client.with_options(max_retries=0).models.list(extra_headers=self._headers)
            served = [model.id async for model in models]
        except (openai.APIError, ValueError, AttributeError, TypeError):  # as in _text
            return (
                "HTTP 404, not an OpenAI-compatible API; set question.server.url to the server's "
                "root, e.g. http://host:8000"
            )
        return f"HTTP 404 for model {self.model!r}; served models: {', '.join(served) or 'none'}"

    def _clean(self, text: str) -> str:
        """``text`` from the server, shortened and without the key."""
        return excerpt(text.replace(self._key, "***") if self._key else text)


def _message(image: Tensor, question: str) -> ChatCompletionUserMessageParam:
    """One question: a uint8 image ``[H, W, 3]`` as a PNG, and its text."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, format="PNG", compress_level=1)  # fast
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": question},
        ],
    }


def _text(completion: ChatCompletion) -> str | None:
    try:
        text = completion.choices[0].message.content
    except (AttributeError, LookupError, TypeError):  # the client does not validate responses
        return None
    return text if isinstance(text, str) else None


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"question.server.api_key_env: ${variable} is not set")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"question.server.api_key_env: ${variable} is not a valid key")
    return key
