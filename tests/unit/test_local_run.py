"""A graph on this machine: order, failures, killed workers, ranks, and signals.

Workers take seconds to start, so all failures of stages share one run, and the processes that are
ended from outside start together.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import stage_functions
from stage_functions import Listener, events_of, saved_submission

from g2rpo.errors import UserError
from reproduce.jobs import launch
from slurm.graph import Graph, Needs, Stage
from slurm.job import TERMINATED
from slurm.local import LocalRun, Slots
from slurm.submission import Submission


def stage(name: str, do: str = "nothing", **fields: object) -> Stage:
    return Stage(name, "train", name, {"do": do}, **fields)  # type: ignore[arg-type]


STAGES = (
    stage("first"),
    stage("bad", "user error"),
    stage("killed", "be killed"),
    stage("pair", "meet, then fail on the second rank", resources=Needs(2)),
    stage("printing", "print"),
    stage("second", needs=("first",)),
    stage("needs-bad", needs=("bad", "first")),
    stage("after-bad", after=("bad", "killed", "pair"), needs=("first",)),
    stage("needs-killed", needs=("killed",)),
    stage("third", needs=("second",), after=("needs-needs-bad",)),
    stage("needs-needs-bad", needs=("needs-bad",)),
)


def named(submission: Submission, event: str) -> list[str]:
    return [words[1] for words in events_of(submission) if words[0] == event]


class Finished:
    """One run of :data:`STAGES` on two slots."""

    def __init__(self, folder: Path) -> None:
        self.submission = saved_submission(folder, STAGES)
        self.listener = Listener()
        run = LocalRun(self.submission, self.submission.graph, Slots(2), self.listener)
        self.outcome = run.run()
        self.children = psutil.Process().children(recursive=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("local"))


def test_each_stage_has_its_own_outcome(finished: Finished) -> None:
    assert finished.outcome == {
        "first": 0, "second": 0, "third": 0, "printing": 0, "after-bad": 0,
        "bad": 2, "killed": -signal.SIGKILL, "pair": 2,
        "needs-bad": TERMINATED, "needs-needs-bad": TERMINATED, "needs-killed": TERMINATED,
    }  # fmt: skip


def test_a_failure_cancels_what_needs_it_and_nothing_else(finished: Finished) -> None:
    cancelled = {words[1:] for words in finished.listener.events if words[0] == "cancelled"}
    assert cancelled == {
        ("needs-bad", "bad"), ("needs-needs-bad", "needs-bad"), ("needs-killed", "killed"),
    }  # fmt: skip
    begun = set(named(finished.submission, "begin"))
    assert begun == set(finished.outcome) - {name for name, _ in cancelled}
    ended = {words[1]: int(words[2]) for words in finished.listener.events if words[0] == "ended"}
    assert ended == {name: finished.outcome[name] for name in begun}
    events = [(words[0], words[1]) for words in events_of(finished.submission)]
    for earlier, later in (("first", "second"), ("second", "third")):
        assert events.index(("end", earlier)) < events.index(("begin", later))
    for earlier in ("bad", "killed", "pair"):
        assert events.index(("begin", earlier)) < events.index(("begin", "after-bad"))


def test_the_ranks_of_a_stage_meet_and_all_must_succeed(finished: Finished) -> None:
    words = [line for line in events_of(finished.submission) if line[0] == "agreed"]
    assert sorted(line[1] for line in words) == ["0", "1"]
    assert all(line[2:] == ["from", "0"] for line in words)
    begun = [line for line in events_of(finished.submission) if line[:2] == ["begin", "pair"]]
    assert sorted(line[3:] for line in begun) == [["0", "2"], ["1", "2"]]
    assert len({line[2] for line in begun}) == 2


def test_workers_are_reused_and_a_killed_one_is_replaced(finished: Finished) -> None:
    single = [w for w in events_of(finished.submission) if w[0] == "begin" and w[1] != "pair"]
    killed = next(words[2] for words in single if words[1] == "killed")
    assert [words[1] for words in single if words[2] == killed][-1] == "killed"
    assert 2 <= len({words[2] for words in single}) <= 3


def test_what_a_stage_prints_goes_to_its_log(finished: Finished) -> None:
    text = finished.submission.local_log("printing").read_text()
    assert sorted(text.splitlines()) == ["to standard error", "to standard output"]
    assert "a mistake that can be fixed" in finished.submission.local_log("bad").read_text()


def test_nothing_is_left_running(finished: Finished) -> None:
    names = [" ".join(process.cmdline()) for process in finished.children if _runs(process)]
    assert [name for name in names if "spawn_main" in name] == []


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_large_stage_is_not_overtaken(tmp_path: Path) -> None:
    stages = [stage("a"), stage("wide", resources=Needs(4)), stage("b")]
    submission = saved_submission(tmp_path, stages)
    run = LocalRun(submission, submission.graph, Slots(2), Listener())
    assert run._next() is submission.graph["a"]
    run._waiting.remove(submission.graph["a"])
    run._free = lambda: [1]  # type: ignore[method-assign]
    assert run._next() is None
    run._free = lambda: [0, 1]  # type: ignore[method-assign]
    assert run._next() is submission.graph["wide"]


def test_every_gpu_is_one_slot(tmp_path: Path) -> None:
    submission = saved_submission(tmp_path, [stage("a")])
    run = LocalRun(submission, Graph(()), Slots(2, ("4", "7")), Listener())
    assert [run._environment(slot) for slot in (0, 1)] == [
        {"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "7"},
    ]  # fmt: skip
    ranks = list(run._ranks(2, (0, 1)))
    assert [rank["RANK"] for rank in ranks] == [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1"]
    assert {rank["CUDA_VISIBLE_DEVICES"] for rank in ranks} == {"4,7"}
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1


@pytest.mark.parametrize(("do", "error"), [("user error", UserError), ("stop", KeyboardInterrupt)])
def test_with_one_job_stages_run_in_this_process_until_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, do: str, error: type[BaseException]
) -> None:
    stages = [stage("a"), stage("bad", do, needs=("a",)), stage("b", after=("bad",))]
    submission = saved_submission(tmp_path, stages)
    monkeypatch.setattr(launch, "run_stage", stage_functions.run)
    with pytest.raises(error):
        launch.run_on_this_machine(submission, submission.graph, 1, Listener())
    here = str(os.getpid())
    assert [words[:3] for words in events_of(submission)] == [
        ["begin", "a", here], ["end", "a", here], ["begin", "bad", here],
    ]  # fmt: skip


# Ended from outside

PROGRAM = """
import sys
from pathlib import Path
from slurm.local import LocalRun, Slots
from slurm.submission import Submission
from stage_functions import Listener
submission = Submission.load(Path(sys.argv[1]))
try:
    LocalRun(submission, submission.graph, Slots(1), Listener()).run()
except KeyboardInterrupt:
    sys.exit(130)
"""


def _until(condition: Callable[[], bool], what: str, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.02)


class Ended:
    """A run in a process of its own, ended by a signal.

    Args:
        folder: of its submission.
        number: the signal.
        early: whether it comes while the worker still starts.
    """

    def __init__(self, folder: Path, number: signal.Signals, *, early: bool = False) -> None:
        self.number, self.early = number, early
        self.submission = saved_submission(folder, [stage("work", "work on"), stage("next")])
        # These stages do not need torch, which is slow to import.
        (folder / "torch.py").write_text("def set_num_threads(count): pass\n")
        path = os.pathsep.join([str(folder), *(entry for entry in sys.path if entry)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder)], env=os.environ | {"PYTHONPATH": path}
        )

    def _workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in children if "spawn_main" in " ".join(one.cmdline())]

    def end(self) -> "Ended":
        """Sends the signal when it is time; waits for all processes."""
        if self.early:
            _until(lambda: bool(self._workers()), "worker")
        else:
            _until(lambda: bool(events_of(self.submission)), "stage")
        self.workers = self._workers()
        self.process.send_signal(self.number)
        self.code = self.process.wait(timeout=600)
        _until(lambda: not any(map(_runs, self.workers)), "end of the workers")
        return self


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    runs = {
        "early": Ended(tmp_path_factory.mktemp("early"), signal.SIGKILL, early=True),
        "TERM": Ended(tmp_path_factory.mktemp("TERM"), signal.SIGTERM),
        "KILL": Ended(tmp_path_factory.mktemp("KILL"), signal.SIGKILL),
    }
    return {name: run.end() for name, run in runs.items()}


@pytest.mark.parametrize(("name", "code"), [("TERM", 130), ("KILL", -9)])
def test_the_running_stage_saves_before_it_ends(
    ended: dict[str, Ended], name: str, code: int
) -> None:
    run = ended[name]
    assert run.code == code
    assert len(run.workers) == 1
    pid = str(run.workers[0].pid)
    assert [words[:3] for words in events_of(run.submission)] == [
        ["begin", "work", pid], ["saved", "work", pid],
    ]  # fmt: skip
    assert "progress is saved" in run.submission.local_log("work").read_text()


def test_a_worker_that_is_left_alone_while_it_starts_does_nothing(
    ended: dict[str, Ended],
) -> None:
    assert ended["early"].workers
    assert events_of(ended["early"].submission) == []
