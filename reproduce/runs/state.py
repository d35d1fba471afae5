"""Where a piece of work stands: judged, for all who show it, from its outputs and last attempt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.text import Text

from g2rpo.attempts import Attempt, Record, is_alive, latest
from g2rpo.progress import WorkProgress

Word = Literal[
    "done", "running", "starting", "waiting", "failed", "cancelled", "interrupted", "unknown"
]
STYLES: dict[Word, str] = {
    "done": "green", "running": "cyan", "starting": "cyan", "waiting": "dim",
    "failed": "bold red", "cancelled": "red", "interrupted": "yellow",
    "unknown": "yellow",
}  # fmt: skip


def state_text(word: Word) -> Text:
    """The word for a state in its colour."""
    return Text(word, STYLES[word])


def latest_attempt(lease: Path) -> Attempt | None:
    """The latest start of the work whose lease is at ``lease``; None where there was none."""
    return latest(lease.parent, lease.name)


@dataclass(frozen=True)
class State:
    """Where a piece of work stands.

    Attributes:
        word: in one word.
        reason: why it is not done, in plain words; empty where it is, or runs.
        attempt: its latest start, or None.
    """

    word: Word
    reason: str = ""
    attempt: Attempt | None = None

    @property
    def record(self) -> Record | None:
        """What its latest start says of itself."""
        return None if self.attempt is None else self.attempt.record

    @property
    def progress(self) -> WorkProgress:
        """How far it says that it is; empty before it started."""
        return WorkProgress() if self.record is None else self.record.progress


def state_of(attempt: Attempt | None, *, done: bool, what: str = "it", since: float = 0.0) -> State:
    """The state of a piece of work.

    Args:
        attempt: its latest start.
        done: whether its outputs are there and undamaged.
        what: it, in the reason.
        since: how an attempt ended before that time is of no interest.
    """
    if done:
        return State("done", "", attempt)
    if attempt is None:
        return State("interrupted", f"{what} has not run")
    record = attempt.record
    if is_alive(attempt):
        return State("starting" if record is None else "running", "", attempt)
    word: Word = "interrupted"
    reason = f"{what} was stopped"
    if record is not None and record.updated >= since:
        reason = record.reason or reason
        if record.state == "failed":
            word, reason = "failed", record.reason or "no reason was told"
        elif record.state == "done":
            reason = f"what {what} wrote is missing or damaged; `g2rpo reproduce` makes it again"
    return State(word, reason, attempt)
