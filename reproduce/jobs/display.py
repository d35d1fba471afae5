"""Shows stages and their states: tables and lines, live on a terminal."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.table import Table

from g2rpo.attempts import Record
from g2rpo.progress import duration
from g2rpo.terminal import literal, plain_table, wide_console
from reproduce.jobs.status import StageStatus, readings
from reproduce.runs.state import STYLES, latest_attempt, state_text
from slurm.graph import Stage
from slurm.submission import Submission

SHOWN = 40
"""Rows of a status table above which inactive stages are hidden."""


# States


def summary(statuses: Sequence[StageStatus]) -> str:
    """The number of stages in each state."""
    counts = Counter(str(status.word) for status in statuses)
    return ", ".join(f"{counts[word]} {word}" for word in STYLES if counts[word])


def status_table(statuses: Sequence[StageStatus], *, everything: bool = False) -> Table:
    """A row per stage; in large submissions, done and waiting stages are only counted."""
    rows = list(statuses)
    if not everything and len(rows) > SHOWN:
        lively = [status for status in rows if status.word not in ("done", "waiting", "cancelled")]
        rows = lively[:SHOWN]
    columns = ("stage", "of", "state", "job", "node", "progress", "ETA", "restarts", "note")
    table = plain_table(*columns, right=("progress", "ETA", "restarts"))
    for status in rows:
        share, remaining = status.share_done, status.remaining
        table.add_row(
            status.stage.kind,
            status.stage.label,
            state_text(status.word),
            status.job,
            status.node,
            "" if share is None else f"{share:.0%}",
            "" if remaining is None else duration(remaining),
            str(status.restarts or ""),
            _remark(status),
        )
    if len(rows) < len(statuses):
        table.add_row("…", f"{len(statuses) - len(rows)} more (show them with --all)")
    return table


def _remark(status: StageStatus) -> str:
    """The reason and log of a failure, or the progress note of a running stage."""
    if status.word in ("failed", "interrupted"):
        log = "" if status.log is None else f"; log: {shown_path(status.log)}"
        return status.reason + log
    return status.progress.note if status.word == "running" else status.reason


def shown_path(path: Path) -> str:
    """``path``, relative if it is inside the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def print_status(
    submission: Submission, statuses: Sequence[StageStatus], *, everything: bool = False
) -> None:
    """Prints the state of a submission."""
    console = wide_console()
    console.print(literal(f"{submission.title}: {submission.name}"))
    console.print(status_table(statuses, everything=everything))
    console.print(literal(summary(statuses)))


class _LiveDisplay:
    """A live display on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        self.console = wide_console(stderr=True)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _print(self, line: str) -> None:
        console = self.console if self._live is None else self._live.console
        console.print(literal(line), soft_wrap=True)


class StatusDisplay(_LiveDisplay):
    """Follows a submission: a live table on a terminal, a line per change in a log."""

    def __init__(self) -> None:
        super().__init__()
        self._words: dict[str, str] = {}

    def follow(self, submission: Submission) -> None:
        """Shows the state of a submission until every stage has ended."""
        for statuses in readings(submission, lambda line: self._print(f"{line}; retrying")):
            if self._live is not None:
                table = status_table(statuses)
                table.caption = literal(summary(statuses))
                self._live.update(table, refresh=True)
                continue
            for status in statuses:
                if self._words.get(status.stage.name) != status.word:
                    self._words[status.stage.name] = status.word
                    self._log(status)

    def _log(self, status: StageStatus) -> None:
        head = f"{time.strftime('%H:%M:%S')} {status.stage}"
        job = f" (job {status.job})" if status.job else ""
        remark = _remark(status)
        self._print(f"{head}: {status.word}{job}" + (f": {remark}" if remark else ""))


# A run on this machine


class LocalDisplay(_LiveDisplay):
    """Shows a run on this machine: a line per ended stage, with running stages below.

    ``stages`` are those to run, of all that the experiment has ``planned``.
    """

    def __init__(self, submission: Submission, stages: Sequence[Stage], planned: int) -> None:
        super().__init__()
        self.submission, self.total = submission, len(stages)
        self.started_at = self._last = time.monotonic()
        self._left = {stage.name: stage.kind for stage in stages}
        self._begun: dict[str, float] = {}
        self._took: dict[str, list[float]] = {}
        self._jobs = 1
        of = f" of {planned}" if planned > len(stages) else ""
        if stages:
            self._print(f"{len(stages)}{of} stages to run")

    def started(self, stage: Stage) -> None:
        """A stage has started."""
        self._begun[stage.name] = time.monotonic()
        self._jobs = max(self._jobs, len(self._begun))

    def ended(self, stage: Stage, code: int) -> None:
        """A stage has ended."""
        took = time.monotonic() - self._begun.pop(stage.name)
        if code == 0:
            self._took.setdefault(stage.kind, []).append(took)
            self._say(stage, f"finished in {duration(took)}")
            return
        record = _record(stage)
        reason = (record and record.reason) or f"exit code {code}"
        log = self.submission.local_log(stage.name)
        where = f"; log: {shown_path(log)}" if log.exists() else ""
        self._say(stage, f"FAILED: {reason}{where}")

    def cancelled(self, stage: Stage, because: Stage) -> None:
        """A stage cannot run."""
        self._say(stage, f"cancelled: {because} failed")

    def waiting(self, running: Sequence[Stage]) -> None:
        """Shows the progress of running stages."""
        if self._live is not None:
            lines = (_running_line(stage) or f"  {stage}: starting" for stage in running)
            self._live.update(Group(*map(literal, lines)), refresh=True)
        elif time.monotonic() - self._last > 60:
            self._last = time.monotonic()
            for stage in running:
                if line := _running_line(stage):
                    self._print(line)

    def _say(self, stage: Stage, what: str) -> None:
        del self._left[stage.name]
        elapsed = time.monotonic() - self.started_at
        head = f"[{self.total - len(self._left)}/{self.total}] {stage}: {what}"
        self._last = time.monotonic()
        eta = f", ETA {duration(self._remaining())}" if self._took else ""
        self._print(f"{head} ({duration(elapsed)} so far{eta})")

    def _remaining(self) -> float:
        """Estimated remaining seconds: a stage takes as long as others of its kind have taken."""
        means = {kind: sum(took) / len(took) for kind, took in self._took.items()}
        usual = sum(means.values()) / len(means)
        return sum(means.get(kind, usual) for kind in self._left.values()) / self._jobs


def _record(stage: Stage) -> Record | None:
    attempt = latest_attempt(Path(stage.lease))
    return None if attempt is None else attempt.record


def _running_line(stage: Stage) -> str:
    record = _record(stage)
    if record is None or record.progress.done is None:
        return ""
    progress, left = record.progress, record.progress.remaining_seconds
    eta = "" if left is None else f", ETA {duration(left)}"
    share = f"{progress.done}/{progress.total}"
    return f"  {stage}: {share}{eta}  {progress.note}".rstrip()
