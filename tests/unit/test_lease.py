"""Leases: one owner at a time, and a process that lost its lease publishes nothing."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.evaluation.scoring.journal import Entry, Journal
from g2rpo import attempts as attempts_module
from g2rpo import lease as lease_module
from g2rpo.attempts import (
    Attempt,
    LeaseSettings,
    attempt_path,
    is_alive,
    latest,
    read_attempts,
)
from g2rpo.errors import UserError
from g2rpo.files import atomic_folder, atomic_path, atomic_write_text, sha256_tree
from g2rpo.lease import Lease, LeaseLost
from g2rpo.progress import ProgressReport
from g2rpo.stop import Stopped, StopRequest
from g2rpo.training.checkpoint import folder as checkpoints
from g2rpo.training.config import CheckpointConfig
from g2rpo.training.metrics import MetricsLog

QUICK = LeaseSettings(heartbeat_seconds=0.03, stale_seconds=300, wait_seconds=600)
AT_ONCE = LeaseSettings(heartbeat_seconds=1000, stale_seconds=2000, wait_seconds=0)
HOUR = 3600.0


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith(("SLURM", "G2RPO_LEASE"))]:
        monkeypatch.delenv(name)
    yield
    StopRequest.clear()


def newest(folder: Path) -> Attempt:
    attempt = latest(folder, "work")
    assert attempt is not None
    return attempt


def rewrite(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Changes an attempt's file behind its owner's back."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def make_foreign(path: Path) -> None:
    """As if the owner were on a machine that cannot be looked into."""
    rewrite(path, lambda data: data["owner"].update(host="elsewhere", pid=77))  # type: ignore[attr-defined]


def shift(path: Path, seconds: float) -> None:
    """Dates a file ``seconds`` from now."""
    moment = time.time() + seconds
    os.utime(path, (moment, moment))


def refused(folder: Path, settings: LeaseSettings = AT_ONCE) -> str:
    with pytest.raises(UserError) as caught:
        Lease.acquire(folder, "work", settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- racing --------------------------------------------------------------------------------------


RACER = """
import os, sys, time
from pathlib import Path
from g2rpo.attempts import LeaseSettings
from g2rpo.lease import Lease
folder = Path(sys.argv[1])
settings = LeaseSettings(heartbeat_seconds=0.03, stale_seconds=300, wait_seconds=600)
for _ in range(4):
    lease = Lease.acquire(folder, "work", settings)
    os.close(os.open(folder / "busy", os.O_CREAT | os.O_EXCL))  # fails where another is inside
    time.sleep(0.005)
    lease.check()
    (folder / "busy").unlink()
    lease.release("done")
    print(lease.number)
"""


def test_of_many_processes_one_is_inside_at_a_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [racer.communicate(timeout=600)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4
    assert sorted(int(line) for text in printed for line in text.split()) == list(range(1, 17))
    assert [attempt.state for attempt in read_attempts(tmp_path, "work")] == ["done"] * 16


def fresh(lease: Lease) -> Lease:
    """Makes the lease look again: once lost, it remembers by whom."""
    lease._lost = None
    return lease


# --- owners that died ----------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from g2rpo.lease import Lease
from g2rpo.progress import ProgressReport
with Lease.acquire(Path(sys.argv[1]), "work") as lease, ProgressReport("train", 9, done=3):
    lease._beat()
    print("holding", flush=True)
    time.sleep(1000)
"""


def test_a_killed_owner_on_the_same_machine_is_succeeded_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        message = refused(tmp_path)
        for part in (f"pid {holder.pid}", "train 3/9", f"kill {holder.pid}"):
            assert part in message
        assert is_alive(newest(tmp_path))

        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
        assert not is_alive(newest(tmp_path))
        with caplog.at_level(logging.WARNING):
            lease = Lease.acquire(tmp_path, "work", AT_ONCE)
    assert lease.number == 2
    (message,) = caplog.messages
    taken = rf"attempt 1 \(.*pid {holder.pid}.*\), last heartbeat .* ago: .*ended"
    assert re.search(taken, message)


def test_a_process_id_that_was_given_away_is_not_the_owner(tmp_path: Path) -> None:
    Lease.acquire(tmp_path, "work", AT_ONCE)
    path = attempt_path(tmp_path / "work", 1)
    rewrite(path, lambda data: data["owner"].update(process_start=1.0))  # type: ignore[attr-defined]
    assert Lease.acquire(tmp_path, "work", AT_ONCE).number == 2


@pytest.mark.parametrize("array", [False, True])
def test_a_requeued_job_succeeds_its_earlier_self(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    survivor = Lease.acquire(tmp_path, "work", AT_ONCE)
    assert "scancel 100_4" if array else "scancel 123" in refused(tmp_path)

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    if array:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
        refused(tmp_path)  # another one of the array
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    successor = Lease.acquire(tmp_path, "work", AT_ONCE)
    successor.check()
    with pytest.raises(LeaseLost, match="attempt 2"):
        survivor.check()
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    refused(tmp_path)  # the survivor must not have it back


# --- clocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_clock", [-HOUR, HOUR])
def test_the_owners_clock_does_not_matter(tmp_path: Path, own_clock: float) -> None:
    Lease.acquire(tmp_path, "work", AT_ONCE)
    path = attempt_path(tmp_path / "work", 1)
    make_foreign(path)
    rewrite(path, lambda data: data.update(updated=data["updated"] + own_clock))  # type: ignore[operator]
    assert newest(tmp_path).age < 300
    assert is_alive(newest(tmp_path))
    assert "elsewhere" in refused(tmp_path)
    shift(path, -HOUR)
    assert newest(tmp_path).age == pytest.approx(HOUR, abs=300)
    assert not is_alive(newest(tmp_path))
    assert Lease.acquire(tmp_path, "work", AT_ONCE).number == 2


def test_a_silent_file_dated_in_the_future_goes_stale_all_the_same(tmp_path: Path) -> None:
    settings = LeaseSettings(heartbeat_seconds=0.05, stale_seconds=0.4, wait_seconds=600)
    Lease.acquire(tmp_path, "work", AT_ONCE)
    path = attempt_path(tmp_path / "work", 1)
    make_foreign(path)
    shift(path, HOUR)
    started = time.monotonic()
    assert Lease.acquire(tmp_path, "work", settings).number == 2
    assert time.monotonic() - started >= 0.4


def test_a_file_dated_in_the_past_that_changes_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LeaseSettings(heartbeat_seconds=0.2, stale_seconds=60, wait_seconds=1.5)
    Lease.acquire(tmp_path, "work", AT_ONCE)
    path = attempt_path(tmp_path / "work", 1)
    make_foreign(path)
    shift(path, -HOUR)
    sleep = time.sleep

    def beat(seconds: float) -> None:
        shift(path, -HOUR)
        sleep(seconds)

    with monkeypatch.context() as beating:
        beating.setattr(time, "sleep", beat)  # so it has changed before each look
        refused(tmp_path, settings)
    assert Lease.acquire(tmp_path, "work", settings).number == 2


def test_a_damaged_file_counts_by_its_age(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b'{"attempt": 1}', b"\xff\x00"), start=1):
        path = attempt_path(tmp_path / "work", number)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        assert "unreadable file" in refused(tmp_path)
        assert (newest(tmp_path).state, newest(tmp_path).record) == ("unknown", None)
        assert is_alive(newest(tmp_path))
        shift(path, -HOUR)
        assert not is_alive(newest(tmp_path))
    lease = Lease.acquire(tmp_path, "work", AT_ONCE)
    assert lease.number == 4
    lease.check()


# --- what an owner that lost its lease can still do ----------------------------------------------


def published(folder: Path) -> dict[str, Callable[[], None]]:
    """Ways to change what is in ``folder``, each by what it is called."""
    log, journal = MetricsLog(folder / "metrics.jsonl", 5), Journal(folder / "journal", "judge", 0)
    entry = Entry("1", "key", {"score": 1.0})
    log.append({"iteration": 5})
    journal.append([entry])
    atomic_write_text(folder / "config.json", "old")
    for iteration in (1, 2, 3):
        with atomic_folder(checkpoints.checkpoint_folder(folder, iteration)) as temporary:
            (temporary / "weights").write_text(f"{iteration}")
    (folder / "checkpoints" / ".iteration-000004.abc.tmp").mkdir()

    def replace_folder() -> None:
        with atomic_folder(checkpoints.checkpoint_folder(folder, 3)) as temporary:
            (temporary / "weights").write_text("new")

    return {
        "a file": lambda: atomic_write_text(folder / "config.json", "new"),
        "a folder": replace_folder,
        "metrics": lambda: log.append({"iteration": 6}),
        "new metrics": lambda: void(MetricsLog(folder / "metrics.jsonl", 0)),
        "scores": lambda: journal.append([entry]),
        "pruning": lambda: checkpoints.prune(folder, CheckpointConfig(keep_last=1)),
        "leftovers": lambda: checkpoints.remove_unfinished(folder),
    }


def void(_: object) -> None:
    return


def test_an_owner_that_lost_its_lease_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ways = published(run)
    before = sha256_tree(run), sorted(run.rglob("*"))
    with Lease.acquire(tmp_path, "work", AT_ONCE) as lease:
        shift(attempt_path(tmp_path / "work", 1), -HOUR)
        successor = Lease.acquire(tmp_path, "work", AT_ONCE)
        for what, publish in ways.items():
            with pytest.raises(LeaseLost, match="attempt 2"):
                publish()
            assert (sha256_tree(run), sorted(run.rglob("*"))) == before, what
        shown = newest(tmp_path).path.read_bytes()
        lease.release("done")
    assert newest(tmp_path).path.read_bytes() == shown  # nor is the successor's own file touched
    # The control: the same works where no lease is lost.
    with successor:
        for what, publish in ways.items():
            old = sha256_tree(run), sorted(run.rglob("*"))
            publish()
            assert (sha256_tree(run), sorted(run.rglob("*"))) != old, what
    assert newest(tmp_path).state == "done"


@pytest.mark.parametrize("kind", [atomic_path, atomic_folder])
def test_temporary_files_that_the_successor_deleted_are_a_lost_lease(
    tmp_path: Path, kind: Callable[[Path], object]
) -> None:
    with Lease.acquire(tmp_path, "work", AT_ONCE):
        shift(attempt_path(tmp_path / "work", 1), -HOUR)
        with pytest.raises(LeaseLost), kind(tmp_path / "run" / "x") as temporary:  # type: ignore[attr-defined]  # noqa: PT012
            Lease.acquire(tmp_path, "work", AT_ONCE)
            if temporary.is_dir():
                temporary.rmdir()
            else:
                temporary.unlink()
            (temporary / "part").write_text("x")


def test_the_successors_file_is_safe_where_the_folder_was_made_anew(tmp_path: Path) -> None:
    lost = Lease.acquire(tmp_path, "work", AT_ONCE)
    lost._path.unlink()
    with pytest.raises(LeaseLost, match="deleted"):
        lost.check()
    fresh(lost)
    Lease.acquire(tmp_path, "work", AT_ONCE).release("done")
    shown = attempt_path(tmp_path / "work", 1).read_bytes()
    lost._beat()
    lost.release("failed", "it should not be seen")
    assert attempt_path(tmp_path / "work", 1).read_bytes() == shown
    with pytest.raises(LeaseLost, match="deleted"):
        lost.check()


# --- file systems that fail ----------------------------------------------------------------------


def test_a_listing_that_fails_for_a_moment_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts_module, "_RETRY_SECONDS", (0.0, 0.0))
    lease = Lease.acquire(tmp_path, "work", AT_ONCE)
    failures = 0
    listing = Path.iterdir

    def failing(self: Path) -> Iterator[Path]:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return listing(self)

    monkeypatch.setattr(Path, "iterdir", failing)
    failures = 2
    lease.check()
    failures = 3
    with pytest.raises(LeaseLost, match=r"cannot be read \(Stale file handle\)"):
        lease.check()
    lease.check()


def test_a_full_disk_stops_neither_heartbeats_nor_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease.acquire(tmp_path, "work", AT_ONCE)

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lease_module, "replace_file", full)
    shift(lease._path, -HOUR)
    lease._beat()
    assert newest(tmp_path).age < HOUR / 2
    lease.release("failed", "the disk is full")
    record = newest(tmp_path).record
    assert record is not None
    assert (record.state, record.reason) == ("failed", "the disk is full")


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file")
    assert "cannot create a lease" in refused(tmp_path)


# --- what others see -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "done", ""),
        (SystemExit(0), "done", ""),
        (SystemExit(3), "failed", "SystemExit: 3"),
        (Stopped("time is over", resume=True), "stopped", "time is over"),
        (KeyboardInterrupt(), "stopped", "interrupted by the keyboard"),
        (UserError("no such\nfile"), "failed", "no such file"),
        (ValueError("a\n  b"), "failed", "ValueError: a b"),
        (AssertionError(), "failed", "AssertionError"),
    ],
)
def test_the_end_is_noted(
    tmp_path: Path, error: BaseException | None, state: str, reason: str
) -> None:
    listener = ProgressReport.listener

    def work() -> None:
        with Lease.acquire(tmp_path, "work", AT_ONCE):
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    attempt = newest(tmp_path)
    assert attempt.record is not None
    assert (attempt.state, attempt.record.reason) == (state, reason)
    assert not is_alive(attempt)
    assert ProgressReport.listener is listener
    # The next one need not wait, and the guard is gone.
    Lease.acquire(tmp_path, "work", AT_ONCE)
    atomic_write_text(tmp_path / "free.txt", "")


def test_heartbeats_carry_the_progress(tmp_path: Path) -> None:
    with (
        Lease.acquire(tmp_path, "work", QUICK),
        ProgressReport("train", 10, done=2) as report,
    ):
        report.advance(3, note="hps 0.3")
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            record = newest(tmp_path).record
            if record is not None and record.progress.done == 5:
                break
            time.sleep(0.01)
        assert record is not None
        progress = record.progress
        assert (progress.description, progress.done, progress.total) == ("train", 5, 10)
        assert progress.note == "hps 0.3"
        assert progress.elapsed_seconds is not None
        assert progress.remaining_seconds is not None
        assert progress.remaining_seconds >= progress.elapsed_seconds * 5 / 3
        assert record.updated > record.started
        assert str(progress).startswith("train 5/10, ETA ")


def test_waiting_is_logged_and_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    owner = Lease.acquire(tmp_path, "work", AT_ONCE)
    settings = LeaseSettings(heartbeat_seconds=0.02, stale_seconds=300, wait_seconds=600)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(Lease.acquire, tmp_path, "work", settings)
        deadline = time.monotonic() + 600
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not waiting.done()
        owner.release("done")
        assert waiting.result(timeout=600).number == 2
    lines = [line for line in caplog.messages if "waiting up to" in line]
    assert len(lines) == 1
    assert f"pid {os.getpid()}" in lines[0] and "\n" not in lines[0]
    with pytest.raises(LeaseLost):
        owner.check()


def test_a_stop_ends_the_waiting(tmp_path: Path) -> None:
    Lease.acquire(tmp_path, "work", AT_ONCE)
    StopRequest.request("enough", resume=True)
    with pytest.raises(Stopped, match="enough"):
        Lease.acquire(tmp_path, "work", QUICK)
    assert newest(tmp_path).number == 1


def test_the_environment_goes_before_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_LEASE_WAIT_SECONDS", "0")
    Lease.acquire(tmp_path, "work")
    refused(tmp_path, QUICK)
    monkeypatch.setenv("G2RPO_LEASE_STALE_SECONDS", "3")
    with pytest.raises(UserError, match=r"G2RPO_LEASE_\*: .*stale_seconds 3 must be greater"):
        LeaseSettings().resolved()
    monkeypatch.setenv("G2RPO_LEASE_HEARTBEAT_SECONDS", "0.5")
    assert LeaseSettings().resolved() == LeaseSettings(
        heartbeat_seconds=0.5, stale_seconds=3, wait_seconds=0
    )
    monkeypatch.setenv("G2RPO_LEASE_STALE_SECONDS", "soon")
    with pytest.raises(UserError, match="stale_seconds"):
        Lease.acquire(tmp_path, "other")
