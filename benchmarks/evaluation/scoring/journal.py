"""Scores on disk as they come: one line per image, so that a kill loses one batch at most."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from g2rpo.checksums import parse_document, with_checksum
from g2rpo.config import content_hash
from g2rpo.files import append_jsonl
from g2rpo.rewards.base import BatchedReward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """The scores of one item.

    Attributes:
        item: its id.
        key: names the image's bytes and the prompt that were scored.
        scores: by column; float32 values, which float64 holds exactly.
    """

    item: str
    key: str
    scores: dict[str, float]


def judge_name(model: BatchedReward) -> str:
    """The name of a reward model's journals: another version, weights or question, another name."""
    asked = [model.version, model.weights_hash, model.template_hash, list(model.columns)]
    return f"{model.name}-{content_hash(asked)}"


class Journal:
    """What one process writes of one reward model; all processes' lines are read together.

    Lines are only ever appended, each with a checksum. One that a kill cut short, or that is
    damaged, is left out, so that its image is scored again.
    """

    def __init__(self, folder: Path, judge: str, rank: int) -> None:
        self.folder, self.judge = folder, judge
        self.path = folder / f"{judge}-rank{rank}.jsonl"

    def read(self) -> Iterator[Entry]:
        """The entries of all ranks."""
        for path in sorted(self.folder.glob(f"{self.judge}-rank*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    yield Entry(**parse_document(line))
                except (ValueError, TypeError):
                    logger.warning("%s: a damaged line; its image is scored again", path)

    def valid(self, keys: Mapping[str, str]) -> dict[str, Entry]:
        """The entries, by item, whose image and prompt are still those of ``keys``."""
        return {entry.item: entry for entry in self.read() if keys.get(entry.item) == entry.key}

    def append(self, entries: Sequence[Entry]) -> None:
        """Writes the entries of a batch and waits until they are on disk.

        Nothing is written by a process that may not publish (:mod:`g2rpo.files`).
        """
        append_jsonl(self.path, [with_checksum(asdict(entry)) for entry in entries])
