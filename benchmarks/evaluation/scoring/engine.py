"""The scoring loop: images are read and prepared ahead while the device scores.

Several processes (``accelerate launch``) share the work. Each writes its own journal, so a killed
run can be resumed with any number of processes.
"""

import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from benchmarks.evaluation.scoring.items import Item, Source, refuse_bad
from benchmarks.evaluation.scoring.journal import Entry, Journal, journal_name
from g2rpo.batching import BatchSize
from g2rpo.data.images import load_image
from g2rpo.errors import UserError
from g2rpo.progress import ProgressReport
from g2rpo.rewards.base import BatchedReward
from g2rpo.stop import Stopped, StopReason, StopRequest

AHEAD = 3
"""Batches prepared while one is scored."""
COLUMNS = (
    "id", "prompt_id", "prompt", "style", "image", "image_sha256",
    "reward", "version", "weights_hash", "template_hash", "score",
)  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    """The processes that share the work."""

    rank: int = 0
    count: int = 1
    local: int = 0
    """The local rank of this process on its machine."""
    wait: Callable[[], None] = lambda: None
    """Barrier: returns when all processes have called it."""
    share: Callable[[StopReason | None], Sequence[StopReason | None]] = lambda reason: [reason]
    """All-gather: returns the values of all processes."""

    @classmethod
    def launched(cls) -> "Ranks":
        """The processes started by ``accelerate launch``, or this one."""
        # A process may wait for the others as long as scoring takes.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
        return cls(
            state.process_index,
            state.num_processes,
            state.local_process_index,
            state.wait_for_everyone,
            lambda reason: gather_object([reason]),
        )

    @property
    def main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0


@dataclass(frozen=True)
class Prepared:
    """A batch ready for the device: its items, their keys and the model's input."""

    items: Sequence[Item]
    keys: list[str]
    inputs: Any


Prepare = Callable[[Sequence[Item]], Prepared]


def item_key(image_sha256: str, prompt: str) -> str:
    """Hash of what is scored: the image's bytes and the prompt."""
    return hashlib.sha256(f"{image_sha256}\n{prompt}".encode()).hexdigest()


def read_images(
    items: Sequence[Item], ranks: Ranks, aspect: float = math.inf
) -> tuple[dict[str, str], dict[str, str]]:
    """Reads every file once, to report all bad files before anything is scored.

    Returns:
        By path, the SHA-256 of the readable files and the errors of the others, among them images
        with a side of more than ``aspect`` times the other.
    """
    paths = sorted({str(item.image) for item in items})
    hashes, reasons = {}, {}
    with (
        ThreadPoolExecutor(_threads()) as pool,
        ProgressReport("read images", len(paths), enabled=ranks.main) as report,
    ):
        for path, result in zip(
            paths, pool.map(partial(_hash_or_error, aspect), paths), strict=True
        ):
            if isinstance(result, UserError):
                reasons[path] = str(result)
            else:
                hashes[path] = result
            report.advance()
    return hashes, reasons


def _hash_or_error(aspect: float, path: str) -> str | UserError:
    try:
        image = load_image(Path(path))
    except UserError as error:
        return error
    height, width, _ = image.pixels.shape
    if max(height, width) > aspect * min(height, width):
        return UserError(
            f"{path}: {width} x {height} pixels, one side more than {aspect:g} times the other, "
            "which the reward model cannot score; crop it"
        )
    return image.sha256


def _threads() -> int:
    return min(16, 2 * (os.cpu_count() or 1))


class Scorer:
    """Scores items with one reward model after another; journals are kept in ``folder``.

    Attributes:
        items: what is scored.
        skipped: pairs of a skipped item's id and the reason.
        too_long: for each reward, the ids of the prompts that it truncated.
        batch_size: for each reward, the largest batch that fit into memory.
        waiting: for each reward, the share of the time in which the model waited for images.

    Raises:
        UserError: an image cannot be read, or one of its sides is more than ``aspect`` times the
            other, and it is not skipped; or none is left.
    """

    def __init__(
        self,
        folder: Path,
        items: Sequence[Item],
        ranks: Ranks | None = None,
        skip_bad: bool = False,
        aspect: float = math.inf,
    ) -> None:
        self.folder, self.ranks = folder, ranks or Ranks()
        self.hashes, reasons = read_images(items, self.ranks, aspect)
        source = Source()
        for item in items:
            reason = reasons.get(str(item.image))
            if reason is None:
                source.items.append(item)
            else:
                source.bad.append((item.id, reason))
        refuse_bad(source, skip_bad)
        items = self.items = source.items
        self.skipped = source.bad
        self.too_long: dict[str, list[str]] = {}
        self.batch_size: dict[str, int] = {}
        self.waiting: dict[str, float] = {}
        self.keys = {item.id: item_key(self.hashes[str(item.image)], item.prompt) for item in items}

    def score(self, name: str, model: BatchedReward) -> pd.DataFrame:
        """Scores the items missing from the journals and returns the rows of all items.

        Rows have :data:`COLUMNS`: for each column of the model (``name``, then ``name.part``), all
        items in order. Only the main process has all rows.

        Raises:
            UserError: a score is not finite, an image has changed, or memory ran out.
            Stopped: a stop was requested; finished scores are in the journals.
        """
        journal = Journal(self.folder, journal_name(model), self.ranks.rank)
        self._record_too_long(name, model)
        done = journal.valid(self.keys)
        self.ranks.wait()  # no process writes before all have read
        # Images of one prompt together, so its text is encoded once.
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
            prepare = partial(_prepare, model, readers)
            stop, waited, started = None, 0.0, time.perf_counter()
            asked = started
            for prepared in _prepared_ahead(lambda: model.batch_size, mine, prepare):
                waited += time.perf_counter() - asked
                if (stop := StopRequest.requested()) is not None:
                    break
                journal.append(_evaluate(model, prepared, prepare))
                report.advance(len(prepared.items))
                asked = time.perf_counter()
            self.waiting[name] = waited / (time.perf_counter() - started)
        self.batch_size[name] = model.batch_size
        self.ranks.wait()
        self._stop_together(stop)
        return self._rows(name, model, journal.valid(self.keys))

    def _stop_together(self, stop: StopReason | None) -> None:
        """Raises on all ranks if one was stopped, so that none waits for another."""
        for reason in self.ranks.share(stop):
            if reason is not None:
                raise Stopped(reason.text, reason.resume)

    def _record_too_long(self, name: str, model: BatchedReward) -> None:
        prompts = {item.prompt_id: item.prompt for item in self.items}
        cut = model.too_long(list(prompts.values()))
        self.too_long[name] = [
            prompt_id for prompt_id, long in zip(prompts, cut, strict=True) if long
        ]

    def _rows(self, name: str, model: BatchedReward, done: dict[str, Entry]) -> pd.DataFrame:
        changed = [item for item in self.items if item.id not in done]
        if changed and self.ranks.main:
            raise UserError(
                f"{changed[0].image}: changed while being scored; run the command again"
            )
        items = [item for item in self.items if item.id in done]
        named = model.version, model.weights_hash, model.template_hash
        frames = []
        for column in model.columns:
            scores = np.array([done[item.id].scores[column] for item in items], dtype=np.float32)
            frames.append(self.rows(column.replace(model.name, name, 1), named, items, scores))
        return pd.concat(frames, ignore_index=True)

    def rows(
        self,
        reward: str,
        model: tuple[str, str, str | None],
        items: Sequence[Item],
        scores: npt.NDArray[np.floating[Any]],
    ) -> pd.DataFrame:
        """One row with :data:`COLUMNS` for each of ``items``.

        Args:
            reward: the reward, or a part of it.
            model: version, weights hash and template hash of its model.
            items: the items.
            scores: their scores.
        """
        version, weights_hash, template_hash = model
        return pd.DataFrame(
            {
                "id": [item.id for item in items],
                "prompt_id": [item.prompt_id for item in items],
                "prompt": [item.prompt for item in items],
                "style": [item.style for item in items],
                "image": [item.name for item in items],
                "image_sha256": [self.hashes[str(item.image)] for item in items],
                "reward": reward,
                "version": version,
                "weights_hash": weights_hash,
                "template_hash": template_hash,
                "score": scores,
            }
        )


def _prepared_ahead(
    size: Callable[[], int], items: Sequence[Item], prepare: Prepare
) -> Iterator[Prepared]:
    """Batches of ``size()`` items in order, prepared ahead in threads."""
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


def _prepare(model: BatchedReward, readers: ThreadPoolExecutor, items: Sequence[Item]) -> Prepared:
    images = list(readers.map(lambda item: load_image(item.image), items))
    keys = [item_key(image.sha256, item.prompt) for item, image in zip(items, images, strict=True)]
    inputs = model.prepare([image.pixels for image in images], [item.prompt for item in items])
    return Prepared(items, keys, inputs)


def _evaluate(model: BatchedReward, prepared: Prepared, prepare: Prepare) -> list[Entry]:
    """Scores a batch; if memory runs out, in smaller batches from then on."""
    items = prepared.items
    hint = "free device memory or use a larger device"
    size = BatchSize(min(len(items), model.batch_size), f"reward {model.name}", hint, unit="image")

    def compute(images: int) -> list[Entry]:
        if images >= len(items):
            return _entries(model, prepared)
        parts = [prepare(items[i : i + images]) for i in range(0, len(items), images)]
        return [entry for part in parts for entry in _entries(model, part)]

    entries = size.run(compute)
    model.batch_size = size.states if size.reduced else model.batch_size
    return entries


def _entries(model: BatchedReward, prepared: Prepared) -> list[Entry]:
    """The scores of a prepared batch."""
    scores = model.score_prepared(prepared.inputs, [item.prompt for item in prepared.items])
    return [
        Entry(item.id, key, dict(zip(model.columns, row, strict=True)))
        for item, key, row in zip(prepared.items, prepared.keys, scores.tolist(), strict=True)
    ]
