"""The state of every run of a results folder, from its files, and as a table.

Nothing here imports a model library: runs are listed on login nodes.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from g2rpo.attempts import Attempt, is_alive, latest
from g2rpo.checksums import hashing_up_to
from g2rpo.errors import UserError
from g2rpo.progress import duration
from g2rpo.terminal import plain_table
from g2rpo.training.metrics import METRICS_FILE, read_metrics
from reproduce.runs.folders import (
    EVALUATIONS,
    MANIFEST,
    SETTINGS,
    read_scored,
    read_settings,
    read_trained,
    run_folders,
)
from reproduce.runs.state import Word, latest_attempt, state_of, state_text
from reproduce.settings import distinctions

Found = TypeVar("Found")
Other = TypeVar("Other")
DIGITS = 4


@dataclass(frozen=True)
class RunState:
    """The state of one run.

    Attributes:
        name: name of its folder.
        settings: its training configuration; empty if it has none, or a damaged one.
        word: its state.
        reason: why it failed or stopped, or which files are damaged; may be empty.
        done: finished iterations; None if nothing is trained.
        total: all iterations.
        remaining: estimated seconds until it is trained; None if it is not running.
        rewards: mean of each training reward in the last iteration.
        validation: mean of each reward in the last validation.
        evaluations: summary of its evaluations.
        node: the node it runs or ran on.
        updated: last change of its files, in seconds since the epoch.
    """

    name: str
    word: Word
    settings: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    done: int | None = None
    total: int | None = None
    remaining: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    validation: Mapping[str, float] = field(default_factory=dict)
    evaluations: str = ""
    node: str = ""
    updated: float = 0.0


def read_run_states(runs_folder: Path) -> list[RunState]:
    """The runs of a folder, most recently changed first."""
    with hashing_up_to():
        states = [read_run_state(folder) for folder in run_folders(runs_folder)]
    return sorted(states, key=lambda state: (-state.updated, state.name))


def read_run_state(folder: Path) -> RunState:
    """The state of the run in ``folder``; a run with damaged files is not done."""
    damage: list[str] = []
    evaluations, evaluated_by = _evaluations(folder, damage)
    config: dict[str, Any] | None = _sound(read_settings, folder, {}, damage)
    if config is None:
        sound = evaluations and not damage
        word: Word = "running" if evaluated_by else ("done" if sound else "interrupted")
        reason, updated = _reason("", damage, folder), _changed(folder, folder / EVALUATIONS)
        return RunState(folder.name, word, reason=reason, evaluations=evaluations, updated=updated)
    rows: list[dict[str, Any]] = _sound(read_metrics, folder / METRICS_FILE, [], damage)
    trained = _sound(read_trained, folder, None, damage) is not None
    attempt = latest_attempt(folder / "leases" / "train")
    state = state_of(attempt, done=trained and not damage)
    word, reason, record = state.word, state.reason, state.record
    times = [_changed(folder / name) for name in (SETTINGS, METRICS_FILE, MANIFEST)]
    times += [] if record is None else [record.updated]
    done = int(rows[-1]["iteration"]) if rows else 0
    planned = config.get("optimization", {}).get("iterations")
    return RunState(
        name=folder.name,
        word=word,
        settings=config,
        reason=_reason(reason if word == "failed" or not damage else "", damage, folder),
        done=done,
        total=done if word == "done" else planned,  # a budget may end it earlier
        remaining=record.progress.remaining_seconds if record and word == "running" else None,
        rewards=_last(rows, "reward/", "/mean"),
        validation=_last(rows, "validation/", ""),
        evaluations=evaluations,
        node="" if record is None else record.node,
        updated=max(times),
    )


def _sound(
    read: Callable[[Path], Found], path: Path, otherwise: Other, damage: list[str]
) -> Found | Other:
    """What ``read`` returns for ``path``; on damage, ``otherwise`` and a new line in ``damage``."""
    try:
        return read(path)
    except (UserError, OSError) as error:
        damage.append(" ".join(str(error).split()))
        return otherwise


def _reason(reason: str, damage: list[str], folder: Path) -> str:
    files = (f"damaged: {one.replace(f'{folder}/', '')}" for one in damage)
    return "; ".join(part for part in (reason, *files) if part)


def _evaluations(folder: Path, damage: list[str]) -> tuple[str, bool]:
    """A summary of the evaluations, and whether one is running."""
    places = sorted(path for path in (folder / EVALUATIONS).glob("*") if path.is_dir())
    scored = [place for place in places if _sound(read_scored, place, None, damage) is not None]
    texts = [f"{len(scored)} scored"] if scored else []
    running = False
    for place in places:
        if place in scored:
            continue
        alive = [a for a in _attempts(place / "leases") if is_alive(a) and a.record is not None]
        running = running or bool(alive)
        reports = [str(a.record.progress) for a in alive if a.record is not None]
        texts.append(next(filter(None, reports), "running" if alive else "unfinished"))
    return ", ".join(texts), running


def _attempts(leases: Path) -> list[Attempt]:
    places = sorted(leases.iterdir()) if leases.is_dir() else []
    attempts = (latest(leases, place.name) for place in places if place.is_dir())
    return [attempt for attempt in attempts if attempt is not None]


def _last(rows: list[dict[str, Any]], before: str, after: str) -> dict[str, float]:
    """The values of the last row with keys ``before`` NAME ``after``, by NAME."""
    for row in reversed(rows):
        values = {
            key.removeprefix(before).removesuffix(after): float(value)
            for key, value in row.items()
            if key.startswith(before) and key.endswith(after)
        }
        if values:
            return values
    return {}


def _changed(*paths: Path) -> float:
    times = [0.0]
    for path in paths:
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


# As a table


def states_table(states: Sequence[RunState], known: Sequence[RunState]) -> Table:
    """A row for each of ``states``, with the settings that distinguish it among ``known`` runs."""
    differs = distinctions({state.name: state.settings for state in known})
    columns = (
        "run", "state", "progress", "ETA", "last reward", "validation", "evaluations",
        "changed", "settings", "",
    )  # fmt: skip
    table = plain_table(*columns, right=("progress", "ETA", "changed"))
    for state in states:
        progress = "" if state.done is None else f"{state.done}/{state.total or '?'}"
        where = f"on {state.node}" if state.word == "running" and state.node else ""
        table.add_row(
            state.name,
            state_text(state.word),
            progress,
            "" if state.remaining is None else duration(state.remaining),
            _values(state.rewards),
            _values(state.validation),
            state.evaluations,
            _ago(state.updated),
            differs[state.name],
            state.reason or where,
        )
    return table


def _values(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.{DIGITS}f}" for name, value in values.items())


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
