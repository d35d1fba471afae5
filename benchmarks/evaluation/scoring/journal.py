"""A journal of scores, one line per image: a killed process loses at most one batch."""

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
        key: hash of the scored image bytes and prompt.
        scores: float32 values by column.
    """

    item: str
    key: str
    scores: dict[str, float]


def journal_name(model: BatchedReward) -> str:
    """The name of a reward model's journals; changes with all that decides a score."""
    model_hashes = [model.version, model.weights_hash, model.template_hash]
    identity = [*model_hashes, list(model.columns), dict(model.settings)]
    return f"{model.name}-{content_hash(identity)}"


class Journal:
    """The scores of one reward model: each process appends to its own file and reads all.

    Every line has a checksum. Truncated or damaged lines are skipped, so their images are scored
    again.
    """

    def __init__(self, folder: Path, name: str, rank: int) -> None:
        self.folder, self.name = folder, name
        self.path = folder / f"{name}-rank{rank}.jsonl"

    def read(self) -> Iterator[Entry]:
        """The entries of all ranks."""
        for path in sorted(self.folder.glob(f"{self.name}-rank*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    yield Entry(**parse_document(line))
                except (ValueError, TypeError):
                    logger.warning("%s: skipping a damaged line; its image is scored again", path)

    def valid(self, keys: Mapping[str, str]) -> dict[str, Entry]:
        """The entries by item, without those whose image or prompt has changed since."""
        return {entry.item: entry for entry in self.read() if keys.get(entry.item) == entry.key}

    def append(self, entries: Sequence[Entry]) -> None:
        """Appends the entries of a batch and syncs them to disk.

        A process that may not publish (:mod:`g2rpo.files`) writes nothing.
        """
        append_jsonl(self.path, [with_checksum(asdict(entry)) for entry in entries])
