"""Configuration of a question: its template, its server, and the weights of its scores."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from g2rpo.config import StrictModel, unhashed
from g2rpo.rewards.server import ServerConfig

ASPECTS = ("alignment", "coherence", "style")
QWEN_ASPECT = 200.0
"""Largest ratio of an image's sides that Qwen's vision-language models accept."""


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


class ModelServerConfig(ServerConfig):
    """An OpenAI-compatible server, e.g. ``vllm serve``."""

    model: str = Field(min_length=1)
    """The model's name on the server."""


class QuestionConfig(StrictModel):
    """The question to a vision-language reward model."""

    template: str | None = None
    """File with the question, ``{prompt}`` in place of the caption. ``own`` is the project's,
    ``published`` the authors' (fetched with ``g2rpo weights fetch unified-reward-question``), None
    the ``question_template.txt`` in the model's folder, else the reward's own if it has one."""
    template_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """The expected SHA-256 of the template file."""
    aggregate: Aggregate = "mean"
    """How the three aspects become one score: their mean, one of them, or a weighted mean."""
    max_answer_tokens: int = Field(default=4096, ge=1)
    """Answers are truncated here; one truncated before its scores is an error."""
    questions: str | None = unhashed(None)
    """Of ``soft_tifa``: the prompt set with the questions of each prompt (``vqa_list``)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of a model in this process; None is float32 on the CPU and bfloat16 on CUDA."""
    server: ModelServerConfig | None = None
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
