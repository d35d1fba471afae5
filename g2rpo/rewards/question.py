"""What is asked of a vision-language model, of which server if any, and how scores are combined."""

from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, model_validator

from g2rpo.config import StrictModel

ASPECTS = ("alignment", "coherence", "style")


class AspectWeights(StrictModel):
    """Weights of a mean over the aspects; only their proportions matter."""

    alignment: float = Field(default=0.0, ge=0)
    coherence: float = Field(default=0.0, ge=0)
    style: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _some_weight(self) -> "AspectWeights":
        if self.alignment + self.coherence + self.style <= 0:
            raise ValueError("give at least one aspect a weight above 0")
        return self


def _kind(value: object) -> str:
    return "AspectWeights" if isinstance(value, (Mapping, AspectWeights)) else "name"


# With a discriminator a mistake is told of the one form that was meant.
Aggregate = Annotated[
    Annotated[Literal["mean", "alignment", "coherence", "style"], Tag("name")]
    | Annotated[AspectWeights, Tag("AspectWeights")],
    Discriminator(_kind),
]


class ServerConfig(StrictModel):
    """An OpenAI-compatible server, e.g. ``vllm serve``, and how patiently it is asked."""

    url: str
    """Its root, e.g. ``http://node7:8000``; a trailing ``/v1`` is the same."""
    model: str = Field(min_length=1)
    """The model as the server names it."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; None where none is needed."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """For connecting, and for each wait for an answer."""
    retries: int = Field(default=5, ge=0)
    """Further tries after a refused connection, a time-out or an answer of 408, 409, 429, 5xx."""
    concurrency: int = Field(default=8, ge=1)
    """Questions under way at a time, in each process."""

    # After all fields, so that an error shows no field's value: a URL may hold a password.
    @model_validator(mode="after")
    def _plain_url(self) -> "ServerConfig":
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must be like http://host:8000")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "url must hold no password, query or fragment; name the environment variable "
                "of the key in api_key_env"
            )
        return self

    def api(self) -> str:
        """The address of the API."""
        return f"{self.url.rstrip('/').removesuffix('/v1')}/v1"


class QuestionConfig(StrictModel):
    """How a reward model that is asked in words is asked."""

    template: str | None = None
    """File with the question, ``{prompt}`` where the caption goes; ``own`` is the project's,
    ``published`` the authors' (fetched with ``g2rpo weights fetch unified-reward-question``). None
    means the ``question_template.txt`` that the model's folder brings."""
    template_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """What the template file must hash to."""
    aggregate: Aggregate = "mean"
    """The score made of the three aspects: their mean, one of them, or a weighted mean."""
    max_answer_tokens: int = Field(default=4096, ge=1)
    """The answer is cut off here; one that is cut before its scores is refused."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of a model in this process; None means float32 on the CPU and bfloat16 on CUDA."""
    server: ServerConfig | None = None
    """Asks this server; None means a model in this process."""
    cache: bool = True
    """Whether well-formed answers are kept on disk and used again."""
    cache_folder: str | None = None
    """None means ``answers`` in ``G2RPO_CACHE``, which is ``~/.cache/g2rpo`` by default."""

    @model_validator(mode="after")
    def _dtype_is_the_servers(self) -> "QuestionConfig":
        if self.server is not None and self.dtype is not None:
            raise ValueError("dtype: a server chooses its own; remove it")
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
