"""What SLURM's commands say of jobs, from recorded answers."""

import time
from pathlib import Path

import pytest

from g2rpo.errors import UserError
from slurm import states
from slurm.states import JobState

SQUEUE = """\
101|RUNNING|None|node[01-02]|g2rpo/table1-flux/ab12
102_0|RUNNING|None|node03|g2rpo/table1-flux/cd34
102_1|COMPLETING|None|node04|g2rpo/table1-flux/cd34
102_2|PENDING|JobArrayTaskLimit||g2rpo/table1-flux/cd34
103|PENDING|Dependency||g2rpo/table1-flux/ef56
104|PENDING|ReqNodeNotAvail, UnavailableNodes:node05||(null)
105|PENDING|(Priority)||somebody's own | with a bar
106|PENDING|launch failed requeued held||x
107|PENDING|BeginTime||x
108|PENDING|SomethingNew||x
109|PENDING|None||x
110|COMPLETED|None|node01|x
not a line of a job
"""
SACCT = """\
101|COMPLETED|0:0|node[01-02]
102_0|FAILED|1:0|node03
102_1|CANCELLED by 1000|0:0|node04
102_[2-7]|PENDING|0:0|None assigned
103|TIMEOUT|0:0|node01
104|OUT_OF_MEMORY|0:125|node01
105|NODE_FAIL|0:0|node02
106|PREEMPTED|0:0|node02
107|RUNNING|0:0|node02
108||0:0|
a warning of the site
"""


def command(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that goes before all others on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def answering(folder: Path, name: str, output: str) -> None:
    (folder / f"{name}.txt").write_text(output)
    record = f'printf "%s " "$@" > {folder}/{name}.arguments'
    command(folder, name, f"{record}\ncat {folder}/{name}.txt")


def test_living_jobs_by_id_with_every_array_task(commands: Path) -> None:
    answering(commands, "squeue", SQUEUE)
    found = states.active_jobs()
    expected = ["101", "102_0", "102_1", "102_2", *(str(number) for number in range(103, 110))]
    assert list(found) == expected
    comment = "g2rpo/table1-flux/ab12"
    assert found["101"] == JobState("101", "RUNNING", "", "node[01-02]", comment)
    assert found["102_2"].reason == "JobArrayTaskLimit" and found["102_2"].node == ""
    assert found["105"].comment == "somebody's own | with a bar"
    assert "--array" in (commands / "squeue.arguments").read_text()


def test_why_jobs_wait_in_words(commands: Path) -> None:
    answering(commands, "squeue", SQUEUE)
    words = {job: state.words for job, state in states.active_jobs().items()}
    assert words["101"] == words["102_1"] == ""
    assert words["102_2"].startswith("waiting for other jobs of its array")
    assert words["103"] == "waiting for the stages that it needs"
    assert words["104"] == "a node that it needs is down or reserved"
    assert words["105"] == "waiting behind jobs of higher priority"
    assert "scontrol release" in words["106"]
    assert "requeued" in words["107"]
    assert words["108"] == "SomethingNew"
    assert words["109"] == "waiting"


def test_ended_jobs_as_accounting_has_them(commands: Path) -> None:
    answering(commands, "sacct", SACCT)
    found = states.ended_jobs(["102_1", "102_0", "101"])
    assert "--jobs=101,102 " in (commands / "sacct.arguments").read_text()
    assert found["101"] == JobState("101", "COMPLETED", "0:0", "node[01-02]")
    assert found["102_0"].words == "failed" and found["102_0"].reason == "1:0"
    assert found["102_1"].state == "CANCELLED"
    assert found["102_[2-7]"].active and found["102_[2-7]"].node == ""
    assert "time limit" in found["103"].words
    assert "memory_gb_per_task" in found["104"].words
    assert found["105"].words == "its node failed"
    assert "preempted" in found["106"].words
    assert found["107"].active
    assert "108" not in found


def test_without_accounting_nothing_is_known_of_ended_jobs(commands: Path) -> None:
    command(commands, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert states.ended_jobs(["1"]) == {}
    assert states.ended_jobs([]) == {}


def test_a_missing_command_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="squeue was not found: run this where SLURM's"):
        states.active_jobs()
    with pytest.raises(UserError, match="scancel was not found"):
        states.cancel_jobs(["1"])
    assert states.ended_jobs(["1"]) == {}


def test_a_command_that_hangs_is_given_up(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "TIMEOUT", 0.3)
    command(commands, "squeue", "exec sleep 30")
    started = time.monotonic()
    with pytest.raises(UserError, match="squeue did not answer within"):
        states.active_jobs()
    assert time.monotonic() - started < 10


def test_a_refusal_is_told_in_one_line(commands: Path) -> None:
    command(commands, "squeue", "printf 'slurm_load_jobs error:\\nUnable to contact' >&2; exit 1")
    with pytest.raises(UserError) as told:
        states.active_jobs()
    assert str(told.value) == "squeue failed: slurm_load_jobs error: Unable to contact"


def test_jobs_that_are_gone_are_cancelled_without_ado(commands: Path) -> None:
    answering(commands, "scancel", "")
    states.cancel_jobs([])
    assert not (commands / "scancel.arguments").exists()
    states.cancel_jobs(["1", "2_3"])
    assert (commands / "scancel.arguments").read_text() == "1 2_3 "
    command(commands, "scancel", "echo 'scancel: error: Invalid job id 1' >&2; exit 1")
    states.cancel_jobs(["1"])
