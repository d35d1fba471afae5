"""The stage that encodes the prompts of all cells once, before other models are loaded.

T5-XXL alone takes 9.5 GB. The embeddings are cached in ``<runs>/embeddings/<hash>/``, named by the
encoders, the sequence length and the dtype; training and sampling read them there.
"""

import functools
import gc
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from g2rpo.config import content_hash
from g2rpo.data.embeddings import (
    CacheKey,
    EmbeddingCache,
    Encoder,
    fill,
)
from g2rpo.data.prompts import prompts_of_iteration, read_prompts
from g2rpo.files import FileState, file_state, read_json, write_json
from g2rpo.policy import PolicyConfig
from g2rpo.policy.folder import resolve_source, text_fingerprint
from g2rpo.policy.size import nfe_per_velocity, read_size
from g2rpo.training.config import TrainConfig
from reproduce.experiment import Hardware, ResolvedCell
from reproduce.experiment.layout import Layout
from reproduce.stages.base import Stage
from reproduce.stages.inputs import Inputs
from slurm.graph import Needs

if TYPE_CHECKING:
    from g2rpo.policy import Policy


@dataclass(frozen=True)
class Embed(Stage):
    """Encodes the prompts of all cells."""

    cells: tuple[ResolvedCell, ...]
    kind = "embed"
    label = "all prompts"

    @functools.cached_property
    def name(self) -> str:
        """A name for the prompts and encoders, whatever the experiment."""
        uses = {repr(use) for cell in self.cells for use in prompt_uses(cell)}
        return f"embed/{content_hash(sorted(uses))}"

    @property
    def lease(self) -> Path:
        return self.layout.runs / "embeddings" / "leases" / self.name.removeprefix("embed/")

    @classmethod
    def devices(cls, hardware: Hardware) -> Needs:
        return Needs(1, hardware.evaluation_devices)

    @classmethod
    def load(cls, inputs: Inputs, payload: Mapping[str, Any]) -> "Embed":
        del payload
        return cls(inputs.layout, tuple(inputs.cells()))

    def is_done(self) -> bool:
        return all(is_embedded(cell, self.layout) for cell in self.cells)

    def run(self) -> None:
        embed(self.cells, self.layout)


@dataclass(frozen=True)
class PromptUse:
    """The prompts of a file that a stage will encode: the first ``limit``, or all."""

    file: Path
    limit: int | None
    draws: tuple[int, int, int] | None = None
    """Seed, iterations and prompts per iteration of the training run that draws from them; None is
    every prompt."""

    def read(self) -> tuple[str, ...]:
        """The unique prompts.

        Raises:
            UserError: the file is invalid, or has too few prompts.
        """
        return _read(self, file_state(self.file))


@functools.lru_cache(maxsize=256)
def _read(use: PromptUse, state: FileState | None) -> tuple[str, ...]:
    del state  # part of the cache key: the file may change
    prompts = read_prompts(use.file, use.limit)
    if use.draws is not None:
        seed, iterations, count = use.draws
        prompts = [
            prompt
            for iteration in range(iterations)
            for prompt in prompts_of_iteration(prompts, count, seed, iteration)
        ]
    return tuple(dict.fromkeys(prompt.text for prompt in prompts))


def _training_uses(train: TrainConfig) -> Iterator[PromptUse]:
    count, iterations = train.rollout.prompts_per_iteration, train.optimization.iterations
    draws = (train.seed, iterations, count)
    yield PromptUse(Path(train.prompts.file), train.prompts.limit, draws)
    for other in (train.validation, train.pictures):
        if other is not None:
            yield PromptUse(Path(other.file), other.limit)


def prompt_uses(cell: ResolvedCell) -> list[tuple[PolicyConfig, PromptUse]]:
    """The prompts a cell encodes, with the policy whose encoders it uses.

    Of the training prompts, only those that the iterations draw with the cell's seed.
    """
    uses = [(cell.policy, PromptUse(Path(cell.evaluation_prompts), cell.evaluation.limit))]
    if (train := cell.train) is not None:
        # The empty prompt is needed where rollouts or training are guided.
        policy = max(train.policy, train.trained_policy, key=nfe_per_velocity)
        uses = [*((policy, use) for use in _training_uses(train)), *uses]
    return uses


def cache_key(policy: PolicyConfig) -> CacheKey | None:
    """The key of a policy's cache; None if its encoders are not on this machine yet."""
    encoders = text_fingerprint(policy.source, policy.revision)
    if encoders is None:
        return None
    return CacheKey(
        encoders=encoders, max_sequence_length=policy.max_sequence_length, dtype=policy.dtype
    )


@functools.cache
def _opened(folder: Path) -> EmbeddingCache:
    return EmbeddingCache(folder)


def _cache_folder(key: CacheKey, layout: Layout) -> Path:
    return layout.runs / "embeddings" / key.name


def prompts_by_policy(cells: Iterable[ResolvedCell]) -> list[tuple[PolicyConfig, list[str]]]:
    """The unique prompts of ``cells`` for each set of encoders."""
    uses: dict[tuple[object, ...], tuple[PolicyConfig, dict[str, None]]] = {}
    for cell in cells:
        for policy, use in prompt_uses(cell):
            same = (policy.source, policy.revision, policy.max_sequence_length, policy.dtype)
            uses.setdefault(same, (policy, {}))[1].update(dict.fromkeys(_texts(policy, use)))
    return [(policy, list(texts)) for policy, texts in uses.values()]


def _texts(policy: PolicyConfig, use: PromptUse) -> tuple[str, ...]:
    """The prompts of ``use``, and the empty one that classifier-free guidance moves away from."""
    return (*use.read(), "") if nfe_per_velocity(policy) > 1 else use.read()


def is_embedded(cell: ResolvedCell, layout: Layout) -> bool:
    """Whether all prompts of a cell are in the cache. Reads no tensors; no network.

    Raises:
        UserError: a prompt file is invalid.
    """
    for policy, use in prompt_uses(cell):
        key = cache_key(policy)
        if key is None or not _opened(_cache_folder(key, layout)).holds(_texts(policy, use)):
            return False
    return True


def embed(cells: Sequence[ResolvedCell], layout: Layout) -> list[Path]:
    """Encodes the missing prompts of ``cells``; returns one cache folder per set of encoders.

    Loads only the text encoders, only if a prompt is missing, and frees them at the end.

    Raises:
        UserError: the encoders cannot be loaded, a prompt file is invalid, or the disk is full.
    """
    folders = []
    for policy, texts in prompts_by_policy(cells):
        size = read_size(resolve_source(policy.source, policy.revision))
        key = cache_key(policy)
        assert key is not None  # the encoders were resolved above
        folder = _cache_folder(key, layout)
        # For people; embeddings are found by the name of the folder.
        write_json(folder.with_suffix(".json"), key.model_dump(mode="json"))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        load = functools.partial(_encoder, policy, device)
        prompt_bytes = size.embedding_bytes(policy)
        fill(_opened(folder), texts, load, prompt_bytes, origin=_origin(device))
        folders.append(folder)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return list(dict.fromkeys(folders))


def _origin(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return packages | {"device": name}


def _encoder(policy: PolicyConfig, device: torch.device, prompts: Sequence[str]) -> Encoder:
    from g2rpo.policy.conditioning import row_of
    from g2rpo.policy.load import policy_class

    folder = resolve_source(policy.source, policy.revision)
    dtype = getattr(torch, policy.dtype)
    kind = policy_class(folder).text_encoders_class
    encoders = kind(folder, dtype, device, policy.max_sequence_length)
    encoders.check_fit(folder, read_json(folder / "transformer" / "config.json"))
    encoders.warn_of_truncated(prompts)
    return lambda prompt: row_of(encoders.encode_one(prompt), 0)


def attach(policy: "Policy", layout: Layout) -> None:
    """Makes ``policy`` read its text embeddings from its cache, if it has one."""
    key = cache_key(policy.config)
    if key is not None and _cache_folder(key, layout).is_dir():
        policy.conditioning_source = _opened(_cache_folder(key, layout))
