"""Encoding what a cache lacks: shard by shard, so that an interruption loses at most one."""

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from g2rpo.checksums import checksums_of, write_document
from g2rpo.data.embeddings.cache import (
    SHARD_SUFFIX,
    EmbeddingCache,
    IndexedPrompt,
    Rows,
    ShardIndex,
    index_path,
    prompt_key,
    rows_digest,
    shard_name,
)
from g2rpo.errors import UserError
from g2rpo.files import atomic_path, remove
from g2rpo.progress import ProgressReport

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
"""Bytes of a shard: at FLUX's 512 x 4096 bfloat16 numbers it holds 64 prompts."""
SHARD_PROMPTS = 1024
"""Prompts of a shard, however small they are: so many are encoded again after a kill."""
LEFTOVER_SECONDS = 3600
"""Age of an unfinished file at which nobody is writing it any more."""
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class FillSettings:
    """How a cache is filled.

    Attributes:
        prompt_bytes: bytes of one prompt's tensors.
        shard_prompts: prompts of a shard; None is as many as :data:`SHARD_BYTES` hold.
        origin: device and packages, noted in the shards' indices.
    """

    prompt_bytes: int
    shard_prompts: int | None = None
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def per_shard(self) -> int:
        """Prompts of a full shard."""
        if self.shard_prompts is not None:
            return self.shard_prompts
        return max(1, min(SHARD_PROMPTS, round(SHARD_BYTES / self.prompt_bytes)))


Encoder = Callable[[str], Rows]


def fill(
    cache: EmbeddingCache,
    prompts: Sequence[str],
    load: Callable[[Sequence[str]], Encoder],
    settings: FillSettings,
) -> int:
    """Encodes those of ``prompts`` that the cache lacks.

    What is there is read and compared with its hash first; a damaged shard is encoded again.
    Interrupted, the same call goes on, and leaves the same files as an undisturbed one.

    ``load`` gives the encoder; it is called with the prompts to encode, if there are any. Returns
    how many were.

    Raises:
        UserError: the disk is full; what was written stays.
    """
    wanted = list(dict.fromkeys(prompts))
    cache.folder.mkdir(parents=True, exist_ok=True)
    with _alone(cache.folder):
        _remove_leftovers(cache.folder)
        cache.refresh()
        cache.verify(wanted)
        todo = cache.missing(wanted)
        if not todo:
            return 0
        free, needed = shutil.disk_usage(cache.folder).free, len(todo) * settings.prompt_bytes
        if needed > free:
            detail = f"{needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free"
            raise _disk_full(cache.folder, detail)
        encode = load(todo)
        done = len(wanted) - len(todo)
        with ProgressReport("embed prompts", len(wanted), done=done) as report:
            for start in range(0, len(todo), settings.per_shard):
                chunk = todo[start : start + settings.per_shard]
                rows = []
                for prompt in chunk:
                    encoded = encode(prompt)
                    rows.append({name: value.cpu() for name, value in encoded.items()})
                    report.advance()
                _write_shard(cache.folder, chunk, rows, settings.origin)
    cache.refresh()
    return len(todo)


def _write_shard(
    folder: Path, prompts: Sequence[str], rows: Sequence[Rows], origin: dict[str, str]
) -> None:
    keys = [prompt_key(prompt) for prompt in prompts]
    shard = folder / shard_name(keys)
    tensors: dict[str, Tensor] = {
        name: torch.stack([row[name] for row in rows]) for name in rows[0]
    }
    entries = tuple(
        IndexedPrompt(prompt=key, content=rows_digest(row))
        for key, row in zip(keys, rows, strict=True)
    )
    try:
        remove(index_path(shard))
        remove(shard)
        with atomic_path(shard) as temporary:
            save_file(tensors, temporary)
        index = ShardIndex(files=checksums_of([shard], folder), entries=entries, origin=origin)
        write_document(index_path(shard), index.model_dump(mode="json", exclude_none=True))
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise _disk_full(folder, f"writing {len(prompts)} prompts") from None


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(f"os error {number}" in str(error) for number in FULL)


def _disk_full(folder: Path, detail: str) -> UserError:
    return UserError(
        f"{folder}: the disk is full ({detail}); the shards that are there are kept: free some "
        "space, or give --results on another disk, then run the same command to go on"
    )


def _remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes left: temporary files, and shards without an index."""
    oldest = time.time() - LEFTOVER_SECONDS
    shards = [path for path in folder.glob(f"*{SHARD_SUFFIX}") if not index_path(path).exists()]
    for path in (*folder.glob(".*.tmp"), *shards):
        try:
            if path.stat().st_mtime < oldest:
                path.unlink()
        except FileNotFoundError:  # another process was faster
            continue


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
