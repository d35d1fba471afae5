"""The stage that encodes prompts: once for all cells, before anything else is in memory.

T5-XXL alone is 9.5 GB. Its embeddings go to ``<runs>/embeddings/<hash>/``, named by the encoders,
the length and the dtype; training and sampling read them there.
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
from g2rpo.policy.size import read_size
from g2rpo.training.config import TrainConfig
from reproduce.experiment import Hardware, ResolvedCell
from reproduce.experiment.layout import Layout
from reproduce.stages.base import Stage
from reproduce.stages.inputs import Inputs
from slurm.graph import Needs

if TYPE_CHECKING:
    from g2rpo.policy import FluxPolicy


@dataclass(frozen=True)
class Embed(Stage):
    """Encodes the prompts of all cells.

    Attributes:
        cells: the cells.
    """

    cells: tuple[ResolvedCell, ...]
    kind = "embed"
    label = "all prompts"

    @functools.cached_property
    def name(self) -> str:
        """Names the prompts and the encoders, whoever needs them."""
        uses = {repr(use) for cell in self.cells for use in prompt_uses(cell)}
        return f"embed/{content_hash(sorted(uses))}"

    @property
    def lease(self) -> Path:
        """The folder of its attempts."""
        return self.layout.runs / "embeddings" / "leases" / self.name.removeprefix("embed/")

    @classmethod
    def devices(cls, hardware: Hardware) -> Needs:
        """One GPU, where there are any."""
        return Needs(1, hardware.evaluation_devices)

    @classmethod
    def load(cls, inputs: Inputs, payload: Mapping[str, Any]) -> "Embed":
        """The stage of a submission."""
        del payload
        return cls(inputs.layout, tuple(inputs.cells()))

    def is_done(self) -> bool:
        """Whether all prompts are encoded."""
        return all(is_embedded(cell, self.layout) for cell in self.cells)

    def run(self) -> None:
        """Encodes those that are not."""
        embed(self.cells, self.layout)


@dataclass(frozen=True)
class PromptUse:
    """Prompts of a file that a stage will encode.

    Attributes:
        file: the prompt file.
        limit: the first so many prompts; None is all.
        draws: (seed, iterations, prompts per iteration) of the training that draws from them; None
            is every one.
    """

    file: Path
    limit: int | None
    draws: tuple[int, int, int] | None = None

    def read(self) -> tuple[str, ...]:
        """The prompts, each once.

        Raises:
            UserError: the file cannot be used, or has too few prompts to draw from.
        """
        return _read(self, file_state(self.file))


@functools.lru_cache(maxsize=256)
def _read(use: PromptUse, state: FileState | None) -> tuple[str, ...]:
    del state  # a changed file is another call
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
    """What a cell encodes, and with which policy's encoders.

    Of the training prompts these are the ones that its iterations draw, which the seed decides.
    """
    uses = [(cell.policy, PromptUse(Path(cell.evaluation_prompts), cell.evaluation.limit))]
    if cell.train is not None:
        uses = [*((cell.train.policy, use) for use in _training_uses(cell.train)), *uses]
    return uses


def cache_key(policy: PolicyConfig) -> CacheKey | None:
    """What names the cache of a policy; None where its encoders are not on this machine yet."""
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
    """The prompts of ``cells``, each once for all policies with the same encoders."""
    uses: dict[tuple[object, ...], tuple[PolicyConfig, dict[PromptUse, None]]] = {}
    for cell in cells:
        for policy, use in prompt_uses(cell):
            same = (policy.source, policy.revision, policy.max_sequence_length, policy.dtype)
            uses.setdefault(same, (policy, {}))[1][use] = None
    return [
        (policy, list(dict.fromkeys(text for use in found for text in use.read())))
        for policy, found in uses.values()
    ]


def is_embedded(cell: ResolvedCell, layout: Layout) -> bool:
    """Whether all prompts that the cell will encode are in the cache.

    Reads indices and prompt files, each once while they do not change; no tensor, no network.

    Raises:
        UserError: a prompt file cannot be used.
    """
    for policy, use in prompt_uses(cell):
        key = cache_key(policy)
        if key is None or not _opened(_cache_folder(key, layout)).holds(use.read()):
            return False
    return True


def embed(cells: Sequence[ResolvedCell], layout: Layout) -> list[Path]:
    """Encodes the prompts of ``cells`` that are not in the cache; returns the caches' folders.

    There is one folder unless the cells' policies have different encoders. Only the text encoders
    are loaded, only where a prompt is missing, and they are dropped at the end.

    Raises:
        UserError: the encoders cannot be loaded, a prompt file cannot be used, or the disk is full.
    """
    folders = []
    for policy, texts in prompts_by_policy(cells):
        size = read_size(resolve_source(policy.source, policy.revision))
        key = cache_key(policy)
        assert key is not None  # the encoders are here now
        folder = _cache_folder(key, layout)
        # For people; embeddings are found by the folder's name.
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
    from g2rpo.policy.conditioning import TextEncoders, row_of

    folder = resolve_source(policy.source, policy.revision)
    dtype = getattr(torch, policy.dtype)
    encoders = TextEncoders(folder, dtype, device, policy.max_sequence_length)
    encoders.check_fit(folder, read_json(folder / "transformer" / "config.json"))
    encoders.warn_of_truncated(prompts)
    return lambda prompt: row_of(encoders.encode_one(prompt), 0)


def attach(policy: "FluxPolicy", layout: Layout) -> None:
    """Lets ``policy`` read its text embeddings from the cache, where there is one for it."""
    key = cache_key(policy.config)
    if key is not None and _cache_folder(key, layout).is_dir():
        policy.conditioning_source = _opened(_cache_folder(key, layout))
