"""The state of a unit of work, from its outputs and its latest attempt."""

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
    """A state in its colour."""
    return Text(word, STYLES[word])


def latest_attempt(lease: Path) -> Attempt | None:
    """The latest attempt under ``lease``; None if there was none."""
    return latest(lease.parent, lease.name)


@dataclass(frozen=True)
class State:
    """The state of a unit of work.

    Attributes:
        word: the state in one word.
        reason: why it is not done; empty if it is done or running.
        attempt: its latest attempt, or None.
    """

    word: Word
    reason: str = ""
    attempt: Attempt | None = None

    @property
    def record(self) -> Record | None:
        """The record of its latest attempt."""
        return None if self.attempt is None else self.attempt.record

    @property
    def progress(self) -> WorkProgress:
        """Its reported progress; empty before it starts."""
        return WorkProgress() if self.record is None else self.record.progress


def state_of(attempt: Attempt | None, *, done: bool, what: str = "it", since: float = 0.0) -> State:
    """The state of a unit of work.

    Args:
        attempt: its latest attempt.
        done: whether its outputs exist and are intact.
        what: its name in the reason.
        since: attempts that ended before this time (seconds since the epoch) are ignored.
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
            word, reason = "failed", record.reason or "no error recorded"
        elif record.state == "done":
            reason = f"outputs of {what} are missing or damaged; rerun `g2rpo reproduce`"
    return State(word, reason, attempt)
