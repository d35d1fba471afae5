"""The run's metrics: one JSON object per iteration, kept in step with the checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from g2rpo.files import atomic_write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsLog:
    """Appends rows to ``metrics.jsonl``.

    On resuming, rows after the checkpoint's iteration are dropped: their iterations run again.

    Attributes:
        empty: whether nothing was kept of an earlier start.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["iteration"] <= iteration]
        self.empty = not kept
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one iteration's row."""
        with self.path.open("a") as handle:
            handle.write(json.dumps(dict(row), allow_nan=False) + "\n")
