"""The catalogue of published artifacts: a typed view of ``catalogue.yaml``."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from g2rpo.config import StrictModel, load_yaml, nearest, validate
from g2rpo.errors import UserError

WEIGHTS = ("policy", "reward", "checkpoint")
"""Purposes of weights; the other artifacts are prompt lists."""
SHA256 = r"^[0-9a-f]{64}$"
COMMIT = r"^[0-9a-f]{40}$"


class PublishedFile(StrictModel):
    """One file of a repository; size and hash are None where the publisher states none."""

    path: str
    """Path inside the repository, with ``/``."""
    size: int | None = Field(None, ge=0)
    """Bytes."""
    sha256: str | None = Field(None, pattern=SHA256)


class PublishedPolicy(StrictModel):
    """What plans need to know of a policy before it is fetched."""

    pipeline: str
    """The class of its diffusers pipeline."""
    transformer: dict[str, Any]
    """The configuration of its transformer, where it differs from diffusers' defaults."""
    text_encoder_parameters: int = Field(ge=0)


class Artifact(StrictModel):
    """Files that are published, fetched and checked together."""

    name: str
    kind: Literal["model", "dataset", "github"] = "model"
    """A Hugging Face model or dataset, or raw files of a GitHub repository."""
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """``owner/name``."""
    revision: str | None = Field(None, pattern=COMMIT)
    """Commit; None is the one in the lock file, else the newest."""
    files: tuple[PublishedFile, ...] = Field(min_length=1)
    licence: str | None = None
    gated: bool = False
    """Whether access must be requested on ``page`` first."""
    page: str
    """The web page of the artifact."""
    purpose: Literal["policy", "reward", "checkpoint", "prompts"]
    architecture: PublishedPolicy | None = None
    """Of a policy."""
    base: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Of a checkpoint: the repository of the policy that it was tuned from."""
    reward: str | None = None
    """Registry name of the reward that uses it."""
    variant: str | None = None
    """The variant of the reward that uses it; None is all."""
    default: bool = True
    """Whether ``variant`` is the reward's default."""
    prompts: int | None = Field(None, ge=1)
    """Number of prompts, all files together."""
    categories: int | None = Field(None, ge=1)
    """Number of their categories."""
    approximate_size: int | None = Field(None, ge=0)
    """Approximate bytes; see ``size_note``."""
    size_note: str | None = None
    sources: tuple[str, ...] = ()
    """Web pages with the revision, sizes, hashes or licence."""
    note: str | None = None

    @property
    def key(self) -> str:
        """The repository's key in the lock file."""
        prefix = {"model": "", "dataset": "datasets/", "github": "github.com/"}[self.kind]
        return prefix + self.repo

    @property
    def needed_by(self) -> str:
        """What uses it, for people."""
        if self.purpose != "reward":
            return self.purpose
        return f"reward {self.reward}" + (f" {self.variant}" if self.variant else "")

    def size(self) -> tuple[int | None, bool]:
        """Total bytes, and whether they are exact."""
        sizes = [file.size for file in self.files]
        known = [size for size in sizes if size is not None]
        if len(known) == len(sizes):
            return sum(known), True
        return self.approximate_size, False


class Catalogue(StrictModel):
    """All artifacts, by unique names."""

    artifacts: tuple[Artifact, ...]

    def select(self, names: Sequence[str], purposes: Iterable[str]) -> tuple[Artifact, ...]:
        """The artifacts of ``purposes``: all, or those in ``names`` (a name or ``owner/name``).

        Raises:
            UserError: a name is not in the catalogue.
        """
        wanted = set(purposes)
        among = [artifact for artifact in self.artifacts if artifact.purpose in wanted]
        for name in names:
            if not any(name in (artifact.name, artifact.repo) for artifact in among):
                hint = nearest(name, [artifact.name for artifact in among])
                raise UserError(f"unknown artifact {name!r}; {hint}")
        if not names:
            return tuple(among)
        return tuple(a for a in among if a.name in names or a.repo in names)

    def of_repository(self, repo: str) -> tuple[Artifact, ...]:
        """The artifacts of the Hugging Face model ``repo``."""
        return tuple(a for a in self.artifacts if a.kind == "model" and a.repo == repo)

    def of_reward(
        self, model: str, source: str | None = None, variant: str | None = None
    ) -> tuple[Artifact, ...]:
        """The artifacts of a reward model by its configuration; none if ``source`` is a folder."""
        return tuple(
            a
            for a in self.artifacts
            if a.reward == model
            and source in (None, a.repo)
            and (a.variant in (None, variant) if variant else a.default)
        )


@functools.cache
def catalogue() -> Catalogue:
    """The catalogue in this package."""
    path = Path(__file__).with_name("catalogue.yaml")
    return validate(Catalogue, load_yaml(path), str(path))
