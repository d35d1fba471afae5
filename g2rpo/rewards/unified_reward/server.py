"""A vision-language model on an OpenAI-compatible server, such as vLLM."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai
from openai.types.chat import ChatCompletion, ChatCompletionUserMessageParam
from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.rewards.client import ServerClient, png_base64
from g2rpo.rewards.question import ModelServerConfig


def _text(completion: ChatCompletion) -> str | None:
    text = completion.choices[0].message.content
    return text if isinstance(text, str) else None


@dataclass(frozen=True)
class Reading:
    """What to read from a completion; ``read`` returns None, or fails, if it is not there."""

    what: str = "text"
    read: Callable[[ChatCompletion], str | None] = _text
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of a request."""


class ServerModel(ServerClient):
    """Asks a server several questions at a time."""

    too_large = "raise the server's limit: a request has one image"

    def __init__(
        self,
        config: ModelServerConfig,
        max_answer_tokens: int,
        accept: Callable[[str], bool],
        reading: Reading = Reading(),
    ) -> None:
        """A question whose answer ``accept`` rejects is asked once more.

        Answers of servers depend on how they batch requests.

        Raises:
            UserError: the environment variable with the key is not set.
        """
        super().__init__(config, "question.server")
        self.model = config.model
        self.weights_hash = f"server:{config.model}"
        self.settings: dict[str, Any] = {
            "backend": "server",
            "temperature": 0,
            "max_answer_tokens": max_answer_tokens,
        }
        self._accept, self._reading = accept, reading

    def prepare(
        self, images: Sequence[Tensor], questions: Sequence[str]
    ) -> list[ChatCompletionUserMessageParam]:
        return [_message(*pair) for pair in zip(images, questions, strict=True)]

    def ask(self, inputs: Sequence[ChatCompletionUserMessageParam]) -> list[str]:
        return self.ask_all(self._answer, inputs)

    async def _answer(
        self, client: openai.AsyncOpenAI, message: ChatCompletionUserMessageParam
    ) -> str:
        for _ in range(2):
            answer = await self._complete(client, message)
            if answer is not None and self._accept(answer):
                return answer
        if answer is None:
            raise UserError(
                f"{self.config.url}: the response is not a chat completion with "
                f"{self._reading.what}; check that question.server.url is the root of an "
                "OpenAI-compatible server"
            )
        return answer

    async def _complete(
        self, client: openai.AsyncOpenAI, message: ChatCompletionUserMessageParam
    ) -> str | None:
        """The answer in one completion; None if the response has none."""
        request = client.chat.completions.create(
            model=self.model,
            messages=[message],
            max_tokens=self.settings["max_answer_tokens"],
            extra_headers=self.headers,
            **{"temperature": self.settings["temperature"], **self._reading.options},
        )
        completion = await self.reply(client, request)
        try:
            return None if completion is None else self._reading.read(completion)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # Responses are not validated.
            return None

    async def not_found(self, client: openai.AsyncOpenAI) -> str:
        """See :meth:`ServerClient.not_found`; lists the models that are served."""
        try:
            models = client.with_options(max_retries=0).models.list(extra_headers=self.headers)
            served = [model.id async for model in models]
        except (openai.APIError, ValueError, RecursionError, AttributeError, TypeError):
            # As in _complete.
            return (
                ", not an OpenAI-compatible API; set question.server.url to the server's root, "
                "e.g. http://host:8000"
            )
        return f" for model {self.model!r}; served models: {', '.join(served) or 'none'}"


def _message(image: Tensor, question: str) -> ChatCompletionUserMessageParam:
    """One question: a uint8 image ``[H, W, 3]`` as a PNG, and its text."""
    url = f"data:image/png;base64,{png_base64(image)}"
    return {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": question},
        ],
    }
