"""The scoring loop: images are read and prepared ahead while the device scores.

Several processes (``accelerate launch``) share the work; each writes a journal of its own, so what
was scored survives a kill, and any number of processes may go on with it.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState

from benchmarks.scoring.items import Item
from benchmarks.scoring.journal import Entry, Journal, judge_name
from g2rpo.data.images import LoadedImage, load_image
from g2rpo.errors import UserError
from g2rpo.files import sha256_file
from g2rpo.progress import ProgressReport
from g2rpo.rewards.base import BatchedReward

AHEAD = 3
"""Batches that are prepared while one is scored."""
COLUMNS = (
    "id", "prompt_id", "prompt", "style", "image", "image_sha256",
    "reward", "version", "weights_hash", "template_hash", "score",
)  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    """The processes that share the work."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    """Returns when all processes have come here."""

    @classmethod
    def launched(cls) -> "Ranks":
        """Those that ``accelerate launch`` started; one where nothing did."""
        # One process may wait for the others as long as scoring takes.
        state = PartialState(timeout=timedelta(days=7))
        return cls(state.process_index, state.num_processes, state.wait_for_everyone)

    @property
    def main(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.rank == 0


@dataclass
class Findings:
    """What scoring told beside the scores.

    Attributes:
        skipped: pairs of an item's id and why it was left out.
        too_long: for each reward the number of prompts that it read only the beginning of.
        batch_size: for each reward the largest batch that fitted into memory.
    """

    skipped: list[tuple[str, str]] = field(default_factory=list)
    too_long: dict[str, int] = field(default_factory=dict)
    batch_size: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A batch that is ready for the device: its items, their keys, and the model's own input.

    ``bad`` tells of the items that could not be read.
    """

    items: list[Item]
    keys: list[str]
    inputs: Any
    bad: list[Entry]


Prepare = Callable[[Sequence[Item]], Prepared]


def item_key(image_sha256: str, prompt: str) -> str:
    """Names what is scored: the bytes of the image file and the prompt."""
    return hashlib.sha256(f"{image_sha256}\n{prompt}".encode()).hexdigest()


def hash_images(items: Sequence[Item], ranks: Ranks) -> dict[str, str]:
    """The SHA-256 of each item's file, by path; every process hashes all, for each needs them."""
    paths = sorted({str(item.image) for item in items})
    hashes: dict[str, str] = {}
    with (
        ThreadPoolExecutor(_threads()) as pool,
        ProgressReport("read images", len(paths), enabled=ranks.main) as report,
    ):
        for path, digest in zip(paths, pool.map(_hash, paths), strict=True):
            hashes[path] = digest
            report.advance()
    return hashes


def _hash(path: str) -> str:
    try:
        return sha256_file(Path(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _threads() -> int:
    return min(16, 2 * (os.cpu_count() or 1))


class Scorer:
    """Scores items with one reward model after the other.

    Args:
        folder: where the journals are kept.
        items: what is scored; their order is that of the result.
        ranks: the processes that share the work.
        skip_bad: leaves out images that cannot be read, where otherwise scoring stops.
    """

    def __init__(
        self,
        folder: Path,
        items: Sequence[Item],
        ranks: Ranks | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.folder, self.items, self.skip_bad = folder, list(items), skip_bad
        self.ranks = ranks or Ranks()
        self.findings = Findings()
        self.hashes = hash_images(items, self.ranks)
        self.keys = {item.id: item_key(self.hashes[str(item.image)], item.prompt) for item in items}

    def score(self, name: str, model: BatchedReward) -> pd.DataFrame:
        """Scores all items that the journals lack, then gives the rows of all of them.

        Args:
            name: what the reward is called in the rows; its parts are ``name.part``.
            model: the reward model.

        Returns:
            rows with :data:`COLUMNS`, for each column of the model (the score first, then its
            parts) all items in their order. Only the main process has all rows.

        Raises:
            UserError: an image cannot be read, a score is not finite, or memory is too small.
        """
        journal = Journal(self.folder, judge_name(model), self.ranks.rank)
        self._tell_too_long(name, model)
        done = {item for item, entry in journal.valid(self.keys).items() if not entry.reason}
        self.ranks.wait()  # nobody writes before all have read
        # Images of one prompt together: its text is then encoded once.
        waiting = sorted(
            (item for item in self.items if item.id not in done), key=lambda item: item.prompt
        )
        mine = waiting[self.ranks.rank :: self.ranks.count]
        seen = len(self.items[self.ranks.rank :: self.ranks.count])
        with (
            ThreadPoolExecutor(_threads()) as readers,
            ProgressReport(
                f"score {name}", seen, done=seen - len(mine), enabled=self.ranks.main
            ) as report,
        ):
            prepare = partial(_prepare, model, self.keys, readers)
            for prepared in _prepared_ahead(lambda: model.batch_size, mine, prepare):
                if prepared.bad and not self.skip_bad:
                    raise UserError(
                        f"{prepared.bad[0].reason}; mend it, or leave it out with --skip-bad "
                        "(what is scored is kept)"
                    )
                journal.append([*_evaluate(model, prepared, prepare), *prepared.bad])
                report.advance(len(prepared.items) + len(prepared.bad))
        self.findings.batch_size[name] = model.batch_size
        self.ranks.wait()
        return self._rows(name, model, journal.valid(self.keys))

    def _tell_too_long(self, name: str, model: BatchedReward) -> None:
        prompts = list(dict.fromkeys(item.prompt for item in self.items))
        self.findings.too_long[name] = sum(model.too_long(prompts))

    def _rows(self, name: str, model: BatchedReward, done: dict[str, Entry]) -> pd.DataFrame:
        items = []
        for item in self.items:
            entry = done.get(item.id)
            if entry is None:
                if self.ranks.main:
                    raise UserError(f"{item.image}: it changed while it was scored; score again")
            elif entry.reason is None:
                items.append(item)
            elif (item.id, entry.reason) not in self.findings.skipped:
                self.findings.skipped.append((item.id, entry.reason))
        frames = []
        for column in model.columns:
            frame = pd.DataFrame(
                {
                    "id": [item.id for item in items],
                    "prompt_id": [item.prompt_id for item in items],
                    "prompt": [item.prompt for item in items],
                    "style": [item.style for item in items],
                    "image": [item.image.name for item in items],
                    "image_sha256": [self.hashes[str(item.image)] for item in items],
                    "reward": column.replace(model.name, name, 1),
                    "version": model.version,
                    "weights_hash": model.weights_hash,
                    "template_hash": model.template_hash,
                    "score": np.array(
                        [done[item.id].scores[column] for item in items], dtype=np.float32
                    ),
                }
            )
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)


def _prepared_ahead(
    size: Callable[[], int], items: Sequence[Item], prepare: Prepare
) -> Iterator[Prepared]:
    """Batches of ``size()`` items in order, a few of them prepared ahead in threads."""
    pending: deque[Future[Prepared]] = deque()
    start = 0
    with ThreadPoolExecutor(AHEAD) as pool:
        try:
            while start < len(items) or pending:
                while start < len(items) and len(pending) < AHEAD:
                    part = items[start : start + size()]
                    start += len(part)
                    pending.append(pool.submit(prepare, part))
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _prepare(
    model: BatchedReward,
    keys: Mapping[str, str],
    readers: ThreadPoolExecutor,
    items: Sequence[Item],
) -> Prepared:
    good, found, images = [], [], []
    bad: list[Entry] = []
    for item, image in zip(items, readers.map(_load_or_reason, items), strict=True):
        if isinstance(image, str):
            bad.append(Entry(item.id, keys[item.id], reason=image))
            continue
        good.append(item)
        images.append(image.pixels)
        found.append(item_key(image.sha256, item.prompt))
    inputs = model.prepare(images, [item.prompt for item in good]) if good else None
    return Prepared(good, found, inputs, bad)


def _load_or_reason(item: Item) -> LoadedImage | str:
    try:
        return load_image(item.image)
    except UserError as error:
        return str(error)


def _evaluate(model: BatchedReward, prepared: Prepared, prepare: Prepare) -> list[Entry]:
    """Scores a batch; where memory is too small, its halves, and smaller batches from then on."""
    size = len(prepared.items)
    if size <= model.batch_size:
        scores = _scores(model, prepared)
        if scores is not None:
            return [
                Entry(item.id, key, dict(zip(model.columns, row, strict=True)))
                for item, key, row in zip(prepared.items, prepared.keys, scores, strict=True)
            ]
        if size == 1:
            raise UserError(
                f"{model.name}: out of memory with one image at a time; free the device, or use "
                "a larger one"
            )
        model.batch_size = size // 2
    halves = prepared.items[: size // 2], prepared.items[size // 2 :]
    return [entry for half in halves for entry in _evaluate(model, prepare(half), prepare)]


def _scores(model: BatchedReward, prepared: Prepared) -> list[list[float]] | None:
    """The batch's scores by item and column, or None where memory is too small."""
    if not prepared.items:
        return []
    try:
        scores: list[list[float]] = model.score_prepared(
            prepared.inputs, [item.prompt for item in prepared.items]
        ).tolist()
        return scores
    except torch.OutOfMemoryError:
        pass
    # Outside of the handler, which would keep the failed call's tensors alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
