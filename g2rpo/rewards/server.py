"""Configuration of a server that computes a reward."""

import os
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from g2rpo.config import StrictModel
from g2rpo.errors import UserError


class ServerConfig(StrictModel):
    """A server, and how to ask it."""

    url: str
    """Its root, e.g. ``http://node7:8000``; a trailing ``/v1`` is optional."""
    api_key_env: str | None = None
    """Name of the environment variable with the key; None if the server needs none."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Per attempt."""
    retries: int = Field(default=5, ge=0)
    """Retries after a refused connection, a timeout or HTTP 408, 409, 429 and 5xx."""
    concurrency: int = Field(default=8, ge=1)
    """Concurrent requests per process."""

    # Of the whole model, so that an error does not show the URL: it may contain a password.
    @model_validator(mode="after")
    def _plain_url(self) -> "ServerConfig":
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must be like http://host:8000")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "url must not contain a password, query or fragment; put the key in an environment "
                "variable and name it in api_key_env"
            )
        return self

    def api(self) -> str:
        """The address of the API."""
        return f"{self.url.rstrip('/').removesuffix('/v1')}/v1"


def read_key(variable: str | None, setting: str) -> str | None:
    """The key in the environment variable that ``setting`` names; None without one.

    Raises:
        UserError: it is not set, or cannot be sent in a header.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"{setting}: ${variable} is not set")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{setting}: ${variable} is not a valid key")
    return key
