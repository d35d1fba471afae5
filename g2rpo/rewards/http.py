"""A reward model behind an HTTP server: `g2rpo serve-reward`, or any other of the same API.

docs/reward_server.json describes the API. Images are PNG files in base64 within JSON: lossless, and
every language can write and read them without a library for multipart forms.
"""

import functools
import json
from collections.abc import Sequence
from typing import Annotated, ClassVar, Self, TypeVar

import openai
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from g2rpo.config import validate
from g2rpo.errors import UserError, reason
from g2rpo.rewards.base import BatchedReward, RewardConfig, check_finite
from g2rpo.rewards.client import ServerClient, png_base64
from g2rpo.rewards.server import ServerConfig
from g2rpo.text import without_repeats


class _Message(BaseModel):
    """Part of the API. Keys that are not known are ignored, so that servers may send more."""

    model_config = ConfigDict(strict=True, frozen=True)


Message = TypeVar("Message", bound=_Message)
OneOrMore = Annotated[list[str], Field(min_length=1)]


def _distinct(names: list[str]) -> list[str]:
    if not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"a name is empty or given twice in {names}")
    return names


class ServerInfo(_Message):
    """What a server scores with."""

    name: str = Field(min_length=1)
    version: str = Field(min_length=1, description="Changes when the scores change.")
    weights_hash: str = Field(description="SHA-256 of the weights.")
    template_hash: str | None = Field(
        default=None, description="SHA-256 of the question to a vision-language model."
    )
    parts: Annotated[list[str], AfterValidator(_distinct)] = Field(
        default=[], description="Distinct names of the partial scores."
    )
    batch_size: int = Field(ge=1, description="Most images in one request.")


class ScoreRequest(_Message):
    """N images and their prompts."""

    prompts: OneOrMore
    images: OneOrMore = Field(description="PNG files of 8-bit RGB in base64, one per prompt.")


class ScoreReply(_Message):
    """The scores of N images, in order."""

    scores: list[float] = Field(description="Finite float32 values; higher is better.")
    parts: dict[str, list[float]] = Field(default={}, description="Partial scores by name.")
    version: str
    weights_hash: str


class RewardServer(ServerClient):
    """The server of a reward model."""

    too_large = "lower the reward's batch_size, or raise the server's limit"

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config, "server")

    def info(self) -> ServerInfo:
        """What it scores with.

        Raises:
            UserError: it gives no such answer, or one with the key, which results would show.
        """

        async def ask(client: openai.AsyncOpenAI, path: str) -> ServerInfo:
            request = client.get(path, cast_to=str, options={"headers": self.headers})
            info = self._read(ServerInfo, path, await self.reply(client, request))
            if self.contains_key(info.model_dump_json()):
                raise UserError(
                    f"{self.config.url}: the answer to /v1{path} shows the key in "
                    f"${self.config.api_key_env}, which would appear in the results; make the "
                    "server answer without it"
                )
            return info

        return self.ask_all(ask, ["/info"])[0]

    def scores(self, requests: Sequence[ScoreRequest], info: ServerInfo) -> Tensor:
        """The scores of all images of ``requests``, float32 ``[N, 1 + parts]``.

        Raises:
            UserError: there is no answer, it is not one of finite scores, or not of ``info``.
        """

        async def ask(client: openai.AsyncOpenAI, request: ScoreRequest) -> Tensor:
            sent = client.post(
                "/score",
                cast_to=str,
                body=request.model_dump(),
                options={"headers": self.headers},
            )
            reply = self._read(ScoreReply, "/score", await self.reply(client, sent))
            return self._checked(reply, request, info)

        return torch.cat(self.ask_all(ask, requests))

    def _read(self, model: type[Message], path: str, text: str | None) -> Message:
        where = f"{self.config.url}: the answer to /v1{path} is not as in docs/reward_server.json"
        try:
            data = json.loads(text or "", object_pairs_hook=without_repeats)
            json.dumps(data, ensure_ascii=False).encode()  # fails for lone surrogates
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({reason(error)})") from None
        if not isinstance(data, dict):
            raise UserError(f"{where}: not a JSON object")
        return validate(model, data, where)

    def _checked(self, reply: ScoreReply, request: ScoreRequest, info: ServerInfo) -> Tensor:
        """The scores of ``reply``, float32 ``[N, 1 + parts]``."""
        url, count = self.config.url, len(request.prompts)
        if (reply.version, reply.weights_hash) != (info.version, info.weights_hash):
            raise UserError(
                f"{url}: the model changed from version {info.version!r}, weights "
                f"{info.weights_hash!r} to version {reply.version!r}, weights "
                f"{reply.weights_hash!r}; serve the first again, or start again with the new one"
            )
        columns = [reply.scores, *(reply.parts.get(part, []) for part in info.parts)]
        for name, values in zip(("scores", *info.parts), columns, strict=True):
            if len(values) != count:
                raise UserError(
                    f"{url}: {len(values)} {name} for {count} images; make the server answer with "
                    "one per image"
                )
        scores = torch.tensor(columns, dtype=torch.float64).float().T
        check_finite(url, scores, request.prompts)
        return scores

    async def not_found(self, client: openai.AsyncOpenAI) -> str:
        return (
            ", not a server of rewards; set server.url to the root of one, e.g. http://host:8000, "
            "as `g2rpo serve-reward` prints it"
        )


@functools.cache
def _asked(config: ServerConfig) -> ServerInfo | UserError:
    try:
        return RewardServer(config).info()
    except UserError as error:
        return error


def server_info(config: ServerConfig) -> ServerInfo:
    """What a server scores with, asked once per process: a run has one model from end to end.

    Raises:
        UserError: it gives no such answer.
    """
    found = _asked(config)
    if isinstance(found, UserError):
        raise UserError(str(found))
    return found


class HTTPReward(BatchedReward):
    """The scores of a server, which is sent ``batch_size`` images at once; version: name-version.

    They are split into requests of as many images as the server takes.
    """

    name: ClassVar[str] = "http"

    def __init__(
        self, server: RewardServer, info: ServerInfo, device: torch.device | str, batch_size: int
    ) -> None:
        super().__init__(device, batch_size, f"{info.name}-{info.version}", info.weights_hash)
        self.part_names = tuple(info.parts)
        self.template_hash = info.template_hash
        self._server, self._info = server, info

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """Asks the server what it scores with.

        Raises:
            UserError: it does not answer, or the key is missing.
        """
        assert config.server is not None
        info = server_info(config.server)
        return cls(RewardServer(config.server), info, device, config.batch_size)

    def prepare(self, images: Sequence[Tensor], prompts: Sequence[str]) -> list[ScoreRequest]:
        """See :meth:`BatchedReward.prepare`; the requests."""
        size = self._info.batch_size
        return [
            ScoreRequest(
                prompts=list(prompts[start : start + size]),
                images=[png_base64(image) for image in images[start : start + size]],
            )
            for start in range(0, len(images), size)
        ]

    def evaluate(self, prepared: list[ScoreRequest]) -> Tensor:
        return self._server.scores(prepared, self._info)
