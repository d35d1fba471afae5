"""Configuration of a question: its template, its server, and the weights of its scores."""

from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, model_validator

from g2rpo.config import StrictModel

ASPECTS = ("alignment", "coherence", "style")


class AspectWeights(StrictModel):
    """Relative weights of the aspects."""

    alignment: float = Field(default=0.0, ge=0)
    coherence: float = Field(default=0.0, ge=0)
    style: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _some_weight(self) -> "AspectWeights":
        if self.alignment + self.coherence + self.style <= 0:
            raise ValueError("at least one aspect needs a weight above 0")
        return self


def _kind(value: object) -> str:
    return "AspectWeights" if isinstance(value, (Mapping, AspectWeights)) else "name"


# With a discriminator, an error message is only about the form that was used.
Aggregate = Annotated[
    Annotated[Literal["mean", "alignment", "coherence", "style"], Tag("name")]
    | Annotated[AspectWeights, Tag("AspectWeights")],
    Discriminator(_kind),
]


class ServerConfig(StrictModel):
    """An OpenAI-compatible server, e.g. ``vllm serve``."""

    url: str
    """Its root, e.g. ``http://node7:8000``; a trailing ``/v1`` is optional."""
    model: str = Field(min_length=1)
    """The model's name on the server."""
    api_key_env: str | None = None
    """Name of the environment variable with the key; None if the server needs none."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Per attempt."""
    retries: int = Field(default=5, ge=0)
    """Retries after a refused connection, a timeout or HTTP 408, 409, 429 and 5xx."""
    concurrency: int = Field(default=8, ge=1)
    """Concurrent questions per process."""

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


class QuestionConfig(StrictModel):
    """The question to a vision-language reward model."""

    template: str | None = None
    """File with the question, ``{prompt}`` in place of the caption. ``own`` is the project's,
    ``published`` the authors' (fetched with ``g2rpo weights fetch unified-reward-question``), None
    the ``question_template.txt`` in the model's folder."""
    template_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """The expected SHA-256 of the template file."""
    aggregate: Aggregate = "mean"
    """How the three aspects become one score: their mean, one of them, or a weighted mean."""
    max_answer_tokens: int = Field(default=4096, ge=1)
    """Answers are truncated here; one truncated before its scores is an error."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of a model in this process; None is float32 on the CPU and bfloat16 on CUDA."""
    server: ServerConfig | None = None
    """Uses this server; None is a model in this process."""
    cache: bool = True
    """Whether well-formed answers are cached on disk."""
    cache_folder: str | None = None
    """None is ``answers`` in ``G2RPO_CACHE``, by default ``~/.cache/g2rpo``."""

    @model_validator(mode="after")
    def _dtype_is_the_servers(self) -> "QuestionConfig":
        if self.server is not None and self.dtype is not None:
            raise ValueError("dtype: has no effect with a server; remove it")
        return self

    def weights(self) -> dict[str, float]:
        """The weight of each aspect in the score; they sum to 1."""
        if isinstance(self.aggregate, AspectWeights):
            given = self.aggregate.model_dump()
        else:
            given = {aspect: float(self.aggregate in ("mean", aspect)) for aspect in ASPECTS}
        return {aspect: given[aspect] / sum(given.values()) for aspect in ASPECTS}

    def aggregate_name(self) -> str:
        """``mean``, an aspect, or the weights, for a reward's version."""
        if not isinstance(self.aggregate, AspectWeights):
            return self.aggregate
        return ",".join(f"{aspect}={weight:.6g}" for aspect, weight in self.weights().items())
