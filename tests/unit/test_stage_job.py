"""One stage in a job: its exit code, what it says, its request to be requeued, its ranks."""

import os
import socket
import sys
from pathlib import Path

import pytest
from stage_functions import events_of, saved_submission

from g2rpo.errors import UserError
from slurm import distributed, job
from slurm.cluster import Cluster
from slurm.distributed import check_master, join
from slurm.graph import Stage
from slurm.job import REQUEUE, TERMINATED, requeue_marker, run_stage
from slurm.submission import Submission

ACTIONS = (
    "nothing", "user error", "full disk", "out of memory", "bug", "stop", "stop and resume",
)  # fmt: skip

FULL = "error: /results/x: disk full or quota exceeded; free some space and run the same command"
NO_MEMORY = "error: out of memory on the GPU (CUDA out of memory. Tried to allocate 20 GiB)"


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"}
    for name in list(os.environ):
        if name.startswith(("SLURM", "SUBMITIT")) or name in ranks:
            monkeypatch.delenv(name)


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    stages = [Stage(action, "train", action, {"do": action}) for action in ACTIONS]
    return saved_submission(tmp_path, stages, Cluster())


@pytest.mark.parametrize(
    ("action", "code", "line"),
    [
        ("nothing", 0, ""),
        ("user error", 2, "error: a mistake that can be fixed"),
        ("full disk", 2, FULL),
        ("out of memory", 2, NO_MEMORY),
    ],
)  # fmt: skip
def test_an_error_that_can_be_fixed_is_one_line(
    submission: Submission, action: str, code: int, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_stage(submission.folder, action) == code
    assert capfd.readouterr().err.strip() == line
    assert [words[0] for words in events_of(submission)] == (
        ["begin"] if code else ["begin", "end"]
    )


def test_a_bug_has_its_traceback(submission: Submission, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_stage(submission.folder, "bug") == 1
    text = capfd.readouterr().err
    assert "Traceback" in text and "stage_functions.py" in text
    assert text.rstrip().endswith("ZeroDivisionError: a bug")


def test_what_is_no_submission_fails_without_a_stage(
    tmp_path: Path, submission: Submission, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_stage(tmp_path / "absent", "nothing") == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert run_stage(submission.folder, "no such stage") == 1
    assert events_of(submission) == []


def test_outside_of_slurm_a_stop_is_a_termination(
    submission: Submission, capfd: pytest.CaptureFixture[str]
) -> None:
    submission.jobs_folder.mkdir()
    for action in ("stop", "stop and resume"):
        assert run_stage(submission.folder, action) == TERMINATED
        assert capfd.readouterr().err.strip() == "stopped: a reason; progress is saved"
    assert list(submission.jobs_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"SLURM_JOB_ID": "17"}, "17"),
        ({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "18", "SLURM_ARRAY_TASK_ID": "1"}, "18_1"),
    ],
)
def test_in_a_job_a_stop_before_the_limit_asks_to_be_requeued(
    submission: Submission, variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    submission.jobs_folder.mkdir()
    marker = requeue_marker(submission.jobs_folder, name)
    assert run_stage(submission.folder, "stop") == TERMINATED
    assert not marker.exists()
    assert run_stage(submission.folder, "stop and resume") == REQUEUE
    assert list(submission.jobs_folder.iterdir()) == [marker]


def test_on_this_machine_inside_of_a_job_nothing_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stage = Stage("a", "train", "a", {"do": "stop and resume"})
    submission = saved_submission(tmp_path, [stage])
    assert run_stage(submission.folder, "a") == TERMINATED
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("stages", "task", "code"),
    [
        (["nothing"], None, 0),
        (["user error"], None, 2),
        (["nothing"], "3", 0),  # what was submitted as one job is no task of an array
        (["nothing", "user error", "nothing"], "1", 2),
    ],
)
def test_the_command_of_a_job_does_its_stage(
    submission: Submission, stages: list[str], task: str | None, code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if task is not None:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
    monkeypatch.setattr(sys, "argv", ["slurm.job", str(submission.folder), *stages])
    with pytest.raises(SystemExit) as left:
        job.main()
    assert left.value.code == code
    (begun, *_) = events_of(submission)
    assert begun[1:3] == (["user", "error"] if code else ["nothing", str(os.getpid())])


# Ranks


def test_one_rank_meets_nobody() -> None:
    with join(1) as ranks:
        assert (ranks.rank, ranks.count, ranks.first) == (0, 1, True)
        assert ranks.agree("a message") == "a message" and ranks.agree(None) is None


def test_another_number_of_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "2"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="the stage needs 4 ranks, 2 were started"), join(4):
        raise AssertionError


def test_an_address_that_cannot_be_used_is_an_error_at_once() -> None:
    with pytest.raises(UserError, match=r"cannot resolve .*'no-such-node.invalid'.*MASTER_ADDR"):
        check_master("no-such-node.invalid", 29500, first=False)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot open port {port} .*MASTER_PORT"):
            check_master("127.0.0.1", port, first=True)
        check_master("127.0.0.1", port, first=False)
    check_master("localhost", port, first=True)
    with socket.socket() as probe:  # it was left free
        probe.bind(("", port))


def _in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_JOB_NODELIST": "node[01-02]",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("given", [None, "10.0.0.7"])
def test_the_meeting_point_is_the_profile_s_or_the_first_node(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    before = dict(os.environ)
    _in_a_job(monkeypatch)
    if given is not None:
        monkeypatch.setenv("MASTER_ADDR", given)
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJobEnvironment.hostnames", ["node01", "node02"])
    try:
        distributed._export()
        assert os.environ["MASTER_ADDR"] == (given or "node01")
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("9", "16")
        assert os.environ["LOCAL_RANK"] == "1"
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    finally:
        os.environ.clear()
        os.environ.update(before)
