"""Text embeddings on disk, so that the text encoders need not be in memory when they are used.

A folder holds shards: safetensors files whose tensors have one row per prompt, and whose header
names the prompts and the SHA-256 of each prompt's tensors. Shards are written atomically, and the
hash of an entry is compared whenever it is read.
"""

import errno
import functools
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from g2rpo.checksums import is_hashed
from g2rpo.config import StrictModel, content_hash
from g2rpo.errors import UserError, reason
from g2rpo.files import FileState, atomic_path, file_state, remove
from g2rpo.progress import ProgressReport

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raised when the same encoders would write other files than before."""
HEADER = "g2rpo"
"""The entry of a shard's metadata. One, since safetensors does not keep their order."""
SHARD_BYTES = 256 * 2**20
"""Bytes of a shard: at FLUX's 512 x 4096 bfloat16 numbers it holds 64 prompts."""
SHARD_PROMPTS = 1024
"""Prompts of a shard, however small they are: at most so many are encoded again after a kill."""
LEFTOVER_SECONDS = 3600
"""Age at which a temporary file no longer belongs to a live process."""
FULL = (errno.ENOSPC, errno.EDQUOT)

Rows = Mapping[str, Tensor]
"""One prompt's tensors by name."""
Encoder = Callable[[str], Rows]


class CacheKey(StrictModel):
    """Everything but the prompt that determines an embedding."""

    encoders: str | dict[str, str]
    """A hash of the encoders' and tokenizers' files, or their hub id and commit."""
    max_sequence_length: int
    dtype: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return content_hash({"format": FORMAT, **self.model_dump(mode="json")})


class Header(StrictModel):
    """What a shard says about itself."""

    entries: dict[str, str]
    """Prompts in the order of the rows, with :func:`rows_digest` of each."""
    origin: dict[str, str]
    """The device and packages that computed it, for people."""


@dataclass(frozen=True)
class Entry:
    """Where a prompt's tensors are, and their hash."""

    shard: Path
    row: int
    digest: str


def rows_digest(rows: Rows) -> str:
    """The SHA-256 of the names, shapes, types and bytes of one prompt's tensors."""
    digest = hashlib.sha256()
    for name in sorted(rows):
        row = rows[name].contiguous()
        digest.update(f"{name} {row.dtype} {tuple(row.shape)}\n".encode())
        digest.update(row.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shard_path(folder: Path, prompts: Iterable[str]) -> Path:
    return folder / f"{content_hash(list(prompts))}.safetensors"


class DamagedShardError(ValueError):
    """A shard cannot be used; says why."""


@functools.lru_cache(maxsize=4096)
def _entries(shard: Path, state: FileState | None) -> dict[str, Entry]:
    """The entries of a shard; no tensor is read. A changed file is another ``state``."""
    del state
    try:
        with safe_open(shard, framework="pt") as opened:
            digests = Header.model_validate_json((opened.metadata() or {}).get(HEADER, "")).entries
    except (OSError, SafetensorError, ValidationError):
        raise DamagedShardError("has a damaged header") from None
    if shard != _shard_path(shard.parent, digests):
        raise DamagedShardError("does not hold the prompts that it is named after")
    return {text: Entry(shard, row, digests[text]) for row, text in enumerate(digests)}


@functools.lru_cache(maxsize=4096)
def _check(shard: Path, state: FileState | None) -> None:
    """Compares all entries of a shard with their hashes."""
    for _ in _read_rows(shard, _entries(shard, state).values()):
        pass


def _read_rows(shard: Path, entries: Iterable[Entry]) -> Iterator[Rows]:
    """The tensors of ``entries``, all of ``shard``, each compared with its hash."""
    try:
        with safe_open(shard, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            for entry in entries:
                here = slice(entry.row, entry.row + 1)
                # Copied, so that the mapped file is not kept open.
                rows = {name: part[here][0].clone() for name, part in slices.items()}
                if rows_digest(rows) != entry.digest:
                    raise DamagedShardError("does not hold what was written")
                yield rows
    except (OSError, SafetensorError, RuntimeError, IndexError) as error:
        raise DamagedShardError(f"cannot be read ({reason(error)})") from None


class EmbeddingCache:
    """The embeddings in a folder that other processes may be adding to.

    Only the prompts' positions are kept in memory.

    Attributes:
        folder: where the shards are; it may not exist yet.
        damaged: shards that are ignored, each in the state that it was found in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: set[tuple[Path, FileState | None]] = set()
        self._entries: dict[str, Entry] = {}
        self._shards: dict[Path, FileState | None] = {}
        self.refresh()

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of ``prompts`` that are not in the cache, each once, in order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self]

    def refresh(self) -> None:
        """Picks up what was written or deleted since the last call; reads headers only."""
        shards = {path: file_state(path) for path in sorted(self.folder.glob("*.safetensors"))}
        if shards == self._shards:
            return
        self._shards, self._entries = shards, {}
        for shard, state in shards.items():
            if (shard, state) in self.damaged:
                continue
            try:
                self._entries |= _entries(shard, state)
            except DamagedShardError as error:
                self._ignore(shard, error)

    def _ignore(self, shard: Path, error: DamagedShardError) -> None:
        logger.warning("%s %s; its prompts will be encoded again", shard, error)
        self.damaged.add((shard, file_state(shard)))
        self._entries = {text: e for text, e in self._entries.items() if e.shard != shard}

    def _by_shard(self, prompts: Iterable[str]) -> dict[Path, dict[str, Entry]]:
        shards: dict[Path, dict[str, Entry]] = {}
        for prompt in prompts:
            entry = self._entries.get(prompt)
            if entry is not None:
                shards.setdefault(entry.shard, {})[prompt] = entry
        return shards

    def holds(self, prompts: Iterable[str]) -> bool:
        """Whether all ``prompts`` are there and intact.

        Cheap to repeat: a shard is only read again after it has changed. A listing
        (:func:`g2rpo.checksums.hashing_up_to`) only reads the headers of large ones.
        """
        self.refresh()
        for shard in self._by_shard(prompts):
            state = self._shards[shard]
            try:
                if state is None or is_hashed(state[-1]):
                    _check(shard, state)
            except DamagedShardError as error:
                self._ignore(shard, error)
        return not self.missing(prompts)

    def read(self, prompts: Sequence[str]) -> dict[str, Rows]:
        """The tensors of those of ``prompts`` that are there and intact, on the CPU.

        A damaged shard is deleted with a warning, so that the next run encodes its prompts.
        """
        if self.missing(prompts):
            self.refresh()
        rows: dict[str, Rows] = {}
        for shard, entries in self._by_shard(prompts).items():
            try:
                rows |= zip(entries, _read_rows(shard, entries.values()), strict=True)
            except DamagedShardError as error:
                self._ignore(shard, error)
                with suppress(OSError):
                    remove(shard)
        return rows


def prompts_per_shard(prompt_bytes: int) -> int:
    """Prompts of a full shard, from the bytes of one prompt's tensors."""
    return max(1, min(SHARD_PROMPTS, round(SHARD_BYTES / prompt_bytes)))


def fill(
    cache: EmbeddingCache,
    prompts: Sequence[str],
    load: Callable[[Sequence[str]], Encoder],
    prompt_bytes: int,
    per_shard: int | None = None,
    origin: Mapping[str, str] | None = None,
) -> int:
    """Encodes those of ``prompts`` that are not in the cache, shard by shard.

    Existing entries are compared with their hashes first, and those of damaged shards are encoded
    again. After an interruption the same call continues, and leaves identical files.

    Args:
        cache: where to write them.
        prompts: repeats are allowed.
        load: returns the encoder; called with the prompts to encode, if there are any.
        prompt_bytes: size of one prompt's tensors.
        per_shard: prompts of a shard; None is :func:`prompts_per_shard`.
        origin: device and packages, recorded in the shards.

    Returns how many prompts were encoded.

    Raises:
        UserError: the disk is full; finished shards are kept.
    """
    prompts = list(dict.fromkeys(prompts))
    cache.folder.mkdir(parents=True, exist_ok=True)
    with _alone(cache.folder):
        _remove_leftovers(cache.folder)
        if cache.holds(prompts):
            return 0
        missing = cache.missing(prompts)
        for shard, state in cache.damaged:
            if file_state(shard) == state:
                remove(shard)
        free, needed = shutil.disk_usage(cache.folder).free, len(missing) * prompt_bytes
        if needed > free:
            sizes = f"{needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free"
            raise _disk_full(cache.folder, sizes)
        encode, size = load(missing), per_shard or prompts_per_shard(prompt_bytes)
        done = len(prompts) - len(missing)
        with ProgressReport("embed prompts", len(prompts), done=done) as report:
            for start in range(0, len(missing), size):
                rows: dict[str, Rows] = {}
                for prompt in missing[start : start + size]:
                    rows[prompt] = {name: value.cpu() for name, value in encode(prompt).items()}
                    report.advance()
                _write_shard(cache.folder, rows, origin or {})
    cache.refresh()
    return len(missing)


def _write_shard(folder: Path, rows: Mapping[str, Rows], origin: Mapping[str, str]) -> None:
    shard = _shard_path(folder, rows)
    names = next(iter(rows.values()))
    tensors = {name: torch.stack([row[name] for row in rows.values()]) for name in names}
    digests = {prompt: rows_digest(row) for prompt, row in rows.items()}
    header = json.dumps({"entries": digests, "origin": dict(origin)})
    try:
        remove(shard)
        with atomic_path(shard) as temporary:
            save_file(tensors, temporary, {HEADER: header})
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise _disk_full(folder, f"writing {len(rows)} prompts") from None


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(f"os error {number}" in str(error) for number in FULL)


def _disk_full(folder: Path, detail: str) -> UserError:
    return UserError(
        f"{folder}: the disk is full ({detail}); finished shards are kept: free some space or give "
        "--results on another disk, then run the same command again to resume"
    )


def _remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files of killed processes."""
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process was faster
            if path.stat().st_mtime < time.time() - LEFTOVER_SECONDS:
                path.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from encoding the same prompts."""
    lock = FileLock(folder / ".encoding.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: waiting for another process that encodes the same prompts", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
