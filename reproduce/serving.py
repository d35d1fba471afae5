"""The reference server of the API in docs/reward_server.json, for any reward model of the suite.

Its packages are those of the extra ``serve``.
"""

import base64
import hmac
from collections.abc import Awaitable, Callable
from threading import Lock

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from torch import Tensor

from g2rpo.data.images import decode_image
from g2rpo.errors import UserError, reason
from g2rpo.rewards.base import BatchedReward, check_inputs
from g2rpo.rewards.http import ScoreReply, ScoreRequest, ServerInfo
from g2rpo.text import visible

MAX_BYTES = 512 * 2**20
"""Of one request: 32 images of a megapixel that do not compress take 134 MB."""
BEARER = Depends(HTTPBearer(auto_error=False))


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


def reward_app(model: BatchedReward, key: str | None = None, max_bytes: int = MAX_BYTES) -> FastAPI:
    """The application.

    Args:
        model: what it scores with.
        key: what clients must send as a bearer token; None lets all of them in.
        max_bytes: the largest request.
    """
    device = Lock()

    def check_key(sent: HTTPAuthorizationCredentials | None = BEARER) -> None:
        given = "" if sent is None else sent.credentials
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise HTTPException(401, "send the server's key as a bearer token")

    app = FastAPI(
        title="Reward server",
        version="1",
        dependencies=[Depends(check_key)],
        responses={status: {"model": Problem} for status in (401, 411, 413, 422)},
    )

    @app.middleware("http")
    async def check_size(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        if "transfer-encoding" in request.headers:
            return _problem(411, "send the length of the request")
        if int(request.headers.get("content-length", 0)) > max_bytes:
            return _problem(413, f"a request has at most {max_bytes} bytes; send fewer images")
        return await call_next(request)

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> Response:
        return _problem(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _problem(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @app.get("/v1/info", summary="What the server scores with")
    def info() -> ServerInfo:
        return ServerInfo(
            name=model.name,
            version=model.version,
            weights_hash=model.weights_hash,
            template_hash=model.template_hash,
            parts=list(model.part_names),
            batch_size=model.batch_size,
        )

    @app.post("/v1/score", summary="Score images against prompts")
    def score(request: ScoreRequest) -> ScoreReply:
        if len(request.images) > model.batch_size:
            raise UserError(
                f"{len(request.images)} images in one request; send at most {model.batch_size}"
            )
        images = [_pixels(text, f"image {n}") for n, text in enumerate(request.images)]
        check_inputs(model.name, images, request.prompts)
        prepared = model.prepare(images, request.prompts)
        with device:
            scores = model.score_prepared(prepared, request.prompts)
        return ScoreReply(
            scores=scores[:, 0].tolist(),
            parts=dict(zip(model.part_names, scores[:, 1:].T.tolist(), strict=True)),
            version=model.version,
            weights_hash=model.weights_hash,
        )

    return app


def _problem(status: int, detail: str) -> Response:
    # Words of a request may be no valid Unicode, which cannot be sent.
    return JSONResponse(Problem(detail=visible(detail)).model_dump(), status)


def _pixels(text: str, name: str) -> Tensor:
    """The pixels of an image file in base64, uint8 ``[H, W, 3]``."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise UserError(f"{name}: not base64 ({reason(error)})") from None
    return decode_image(data, name)
