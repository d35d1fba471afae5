"""The cache's format and its reading.

A folder holds shards. A shard is a safetensors file, whose tensors have one row for each of its
prompts, and beside it an index that is written last: what has no index is not there. An entry is
found by the hash of its prompt's exact text and has a hash of its own content, which is compared
whenever it is read.
"""

import hashlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from g2rpo.checksums import hashing_up_to, parse_document, problems
from g2rpo.config import StrictModel, content_hash, validate
from g2rpo.errors import UserError
from g2rpo.files import remove

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised when the same encoders would write other files than before."""
SHA256 = r"^[0-9a-f]{64}$"
SHARD_SUFFIX = ".safetensors"
SETTLED_NS = 2 * 10**9
"""A folder that changed so recently may change again under the same time stamp."""

Rows = Mapping[str, Tensor]
"""One prompt's tensors by their names."""


class CacheKey(StrictModel):
    """What embeddings are made with, besides the prompt."""

    encoders: str | dict[str, str]
    """A hash of the encoders' and tokenizers' files, or their hub id and commit."""
    max_sequence_length: int
    dtype: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return content_hash({"format": FORMAT, **self.model_dump(mode="json")})


class IndexedPrompt(StrictModel):
    """An entry: the hashes of its prompt and of its tensors."""

    prompt: str = Field(pattern=SHA256)
    content: str = Field(pattern=SHA256)


class ShardIndex(StrictModel):
    """What is written beside a shard."""

    format: int = Field(FORMAT, ge=FORMAT, le=FORMAT)
    size: int | None = None
    """Bytes of the shard, as older versions wrote it."""
    files: dict[str, dict[str, Any]] | None = None
    """The shard's name with its checksum."""
    entries: tuple[IndexedPrompt, ...]
    """In the order of the tensors' rows."""
    origin: dict[str, str] = Field(default_factory=dict)
    """The device and packages that computed it, for people."""

    def recorded(self, shard: Path) -> Mapping[str, Any]:
        """What the shard is compared with (:func:`g2rpo.checksums.problems`)."""
        return {shard.name: self.size} if self.files is None else self.files


@dataclass(frozen=True)
class Entry:
    """Where a prompt's tensors are."""

    shard: Path
    row: int
    content: str


def prompt_key(prompt: str) -> str:
    """The SHA-256 of a prompt's exact text."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def rows_digest(rows: Rows) -> str:
    """The SHA-256 of the names, shapes, types and bytes of one prompt's tensors."""
    digest = hashlib.sha256()
    for name in sorted(rows):
        row = rows[name].contiguous()
        digest.update(f"{name} {row.dtype} {tuple(row.shape)}\n".encode())
        digest.update(row.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shard_name(keys: Sequence[str]) -> str:
    """The file name of the shard of these prompts: it says what the shard shall hold."""
    return content_hash(list(keys)) + SHARD_SUFFIX


def index_path(shard: Path) -> Path:
    """The index of a shard."""
    return shard.with_suffix(".json")


class EmbeddingCache:
    """The embeddings in a folder, which other processes may be adding to.

    Nothing is held in memory but which prompts are there; what is read is copied out of the mapped
    files.

    Attributes:
        folder: where the shards are; it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, Entry] = {}
        self._shards: dict[str, tuple[str, ...]] = {}
        self._recorded: dict[Path, Mapping[str, Any]] = {}
        self._told: set[str] = set()
        self._held: dict[frozenset[str], frozenset[Path] | None] = {}
        self._stamp: int | None = None
        self.refresh()

    def __contains__(self, prompt: str) -> bool:
        return prompt_key(prompt) in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def holds(self, keys: frozenset[str]) -> bool:
        """Whether all prompts of these keys (:func:`prompt_key`) are there, in undamaged shards.

        Cheap to ask again: a shard is only read again where it has changed.
        """
        self.refresh()
        if keys not in self._held:
            known = keys <= self._entries.keys()
            self._held[keys] = frozenset(self._entries[k].shard for k in keys) if known else None
        shards = self._held[keys]
        return shards is not None and all(self._is_whole(shard) for shard in sorted(shards))

    def _problem(self, shard: Path) -> str | None:
        found = next(problems(self.folder, self._recorded[shard]), None)
        if found is None:
            return None
        path, problem = found
        return problem if path.name == shard.name else f"has an index that {problem}"

    def _is_whole(self, shard: Path) -> bool:
        problem = self._problem(shard)
        if problem is not None:
            self._tell(shard, problem)
        return problem is None

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of ``prompts`` that are not there, each once, in their order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self]

    def refresh(self) -> None:
        """Takes note of what was written or deleted since the last time; no tensor is read."""
        try:
            stamp = self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            stamp = None
        if stamp is not None and stamp == self._stamp:
            return
        # Read again the next time, unless the folder has been at rest for a while.
        settled = stamp is not None and time.time_ns() - stamp > SETTLED_NS
        self._stamp = stamp if settled else None
        found = {path.name for path in self.folder.glob("*.json")} if stamp is not None else set()
        if found == self._shards.keys():
            return
        for name in self._shards.keys() - found:
            self._forget(name)
        for name in sorted(found - self._shards.keys()):
            self._take_in(self.folder / name)
        self._held.clear()

    def _take_in(self, path: Path) -> None:
        shard = path.with_suffix(SHARD_SUFFIX)
        try:
            data = path.read_bytes()
            index = validate(ShardIndex, parse_document(data), str(path))
            keys = tuple(entry.prompt for entry in index.entries)
            if shard_name(keys) != shard.name:
                raise ValueError("the index of another shard")
        except FileNotFoundError:  # another process is encoding it again
            return
        except (OSError, ValueError, UserError):
            self._tell(shard, "has a damaged index")
            return
        own = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        self._recorded[shard] = {**index.recorded(shard), path.name: own}
        with hashing_up_to(0):  # what is in it is compared where it is used
            if not self._is_whole(shard):
                return
        self._shards[path.name] = keys
        for row, entry in enumerate(index.entries):
            self._entries[entry.prompt] = Entry(shard, row, entry.content)

    def _forget(self, name: str) -> None:
        shard = (self.folder / name).with_suffix(SHARD_SUFFIX)
        for key in self._shards.pop(name, ()):
            if key in self._entries and self._entries[key].shard == shard:
                del self._entries[key]
        self._held.clear()

    def _tell(self, shard: Path, problem: str) -> None:
        """Says once what is wrong with a shard."""
        if shard.name not in self._told:
            self._told.add(shard.name)
            logger.warning("%s %s; its prompts are encoded again", shard, problem)

    def _discard(self, shard: Path, problem: str) -> None:
        """Leaves a damaged shard out, for other processes too where the folder can be written."""
        self._tell(shard, problem)
        index = index_path(shard)
        self._forget(index.name)
        try:
            remove(index)
        except OSError:
            # It stays known as one without entries, so that it is not taken in again.
            self._shards[index.name] = ()

    def read(self, prompts: Sequence[str]) -> dict[str, Rows]:
        """The tensors of those of ``prompts`` that are there and intact, by prompt, on the CPU.

        A shard that is damaged is told in a logged warning and no longer part of the cache.
        """
        if any(prompt not in self for prompt in prompts):
            self.refresh()
        wanted: dict[Path, dict[str, Entry]] = {}
        for prompt in prompts:
            entry = self._entries.get(prompt_key(prompt))
            if entry is not None:
                wanted.setdefault(entry.shard, {})[prompt] = entry
        found: dict[str, Rows] = {}
        for shard, entries in wanted.items():
            rows = self._read_shard(shard, list(entries.values()))
            if rows is not None:
                found |= zip(entries, rows, strict=True)
        return found

    def verify(self, prompts: Iterable[str]) -> None:
        """Reads the entries of ``prompts`` and leaves out the shards that are damaged."""
        wanted: dict[Path, list[Entry]] = {}
        for prompt in dict.fromkeys(prompts):
            entry = self._entries.get(prompt_key(prompt))
            if entry is not None:
                wanted.setdefault(entry.shard, []).append(entry)
        for shard, entries in wanted.items():
            problem = self._problem(shard)
            if problem is not None:
                self._discard(shard, problem)
                continue
            if isinstance(self._recorded[shard][shard.name], dict):
                continue  # its own checksum was compared
            for entry in entries:  # one at a time: a shard need not fit into memory twice
                if self._read_shard(shard, [entry]) is None:
                    break

    def _read_shard(self, shard: Path, entries: Sequence[Entry]) -> list[Rows] | None:
        """The tensors of ``entries``, all of ``shard``; None where one is damaged."""
        try:
            with safe_open(shard, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                # Copied, so that the mapped file is not kept open.
                rows: list[Rows] = []
                for entry in entries:
                    here = slice(entry.row, entry.row + 1)
                    rows.append({name: part[here][0].clone() for name, part in slices.items()})
        except FileNotFoundError:
            self._discard(shard, "is gone")
            return None
        except (OSError, SafetensorError, RuntimeError, IndexError) as error:
            self._discard(shard, f"cannot be read ({' '.join(str(error).split())[:200]})")
            return None
        for entry, row in zip(entries, rows, strict=True):
            if rows_digest(row) != entry.content:
                self._discard(shard, "does not hold what was written")
                return None
        return rows
