"""Job states, from recorded answers of SLURM's commands."""

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
9_[0,5-15:5,20%2]|CANCELLED|JobHeldUser||x
not a line of a job
"""
SACCT = """\
101|COMPLETED|0:0|node[01-02]
102_0|FAILED|1:0|node03
102_1|CANCELLED by 1000|0:0|node04
102_[2-3,5,7-11:2%4]|CANCELLED by 1000|0:0|None assigned
102_3|COMPLETED|0:0|node04
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
    found = states.known_jobs()
    expected = ["101", "102_0", "102_1", "102_2", *(str(number) for number in range(103, 110))]
    assert [job for job, state in found.items() if state.active] == expected
    assert [job for job, state in found.items() if state.state == "CANCELLED"] == [
        f"9_{index}" for index in (0, 5, 10, 15, 20)
    ]
    comment = "g2rpo/table1-flux/ab12"
    assert found["101"] == JobState("101", "RUNNING", "", "node[01-02]", comment)
    assert found["102_2"].reason == "JobArrayTaskLimit" and found["102_2"].node == ""
    assert found["105"].comment == "somebody's own | with a bar"
    given = (commands / "squeue.arguments").read_text()
    assert "--array" in given and "--states=all" in given


def test_why_jobs_wait_in_words(commands: Path) -> None:
    answering(commands, "squeue", SQUEUE)
    words = {job: state.words for job, state in states.known_jobs().items()}
    assert words["101"] == words["102_1"] == ""
    assert words["102_2"].startswith("waiting for other tasks of its array")
    assert words["103"] == "waiting for the stages it depends on"
    assert words["104"] == "a node it needs is down or reserved"
    assert words["105"] == "waiting behind jobs of higher priority"
    assert "scontrol release" in words["106"]
    assert "requeued" in words["107"]
    assert words["108"] == "SomethingNew"
    assert words["109"] == "waiting"


def test_ended_jobs_as_accounting_has_them(commands: Path) -> None:
    answering(commands, "sacct", SACCT)
    array = [f"102_{index}" for index in range(13)]
    single = [str(number) for number in (101, *range(103, 110))]
    listed = {"109": JobState("109", "FAILED", "NonZeroExitCode")}
    found = states.ended_jobs([*array, *single], listed)
    given = (commands / "sacct.arguments").read_text()
    assert "--jobs=101,102,103,104,105,106,107,108,109 " in given
    assert found["101"] == JobState("101", "COMPLETED", "0:0", "node[01-02]")
    assert found["102_0"].words == "failed" and found["102_0"].reason == "1:0"
    ended = {job: found[job].state for job in array}
    assert ended.pop("102_0") == "FAILED" and ended.pop("102_3") == "COMPLETED"
    # The range names some of the others. The rest SLURM has forgotten, as it does with tasks that
    # are cancelled while their array waits.
    assert set(ended.values()) == {"CANCELLED"} and found["102_9"].node == ""
    assert "timed out" in found["103"].words
    assert "memory_gb_per_task" in found["104"].words
    assert found["105"].words == "its node failed"
    assert "preempted" in found["106"].words
    assert "107" not in found and "108" not in found
    assert found["109"] == listed["109"]


def test_a_task_that_no_list_has_was_cancelled_where_its_array_is_known(commands: Path) -> None:
    command(commands, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    sibling = JobState("21_0", "RUNNING")
    found = states.ended_jobs(["21_1", "22_1", "23"], {"21_0": sibling})
    assert {job: state.words for job, state in found.items()} == {"21_1": "cancelled"}
    # An old line for a range, an array of which only the id is left, an index that was cut off.
    lines = "21_[1-3%1]|PENDING|0:0|\n22|CANCELLED|0:0|\n23_[0-1,...]|CANCELLED|0:0|\n"
    answering(commands, "sacct", lines + "24_[2]|RUNNING|0:0|node01\n")
    found = states.ended_jobs(["21_2", "22_7", "23_1", "23_9", "24_2"], {})
    assert {job: state.state for job, state in found.items()} == dict.fromkeys(
        ("21_2", "22_7", "23_1", "23_9"), "CANCELLED"
    )


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("printf 'slurm_load_jobs error:\\nUnable to contact' >&2; exit 1",
         "squeue failed: slurm_load_jobs error: Unable to contact"),
        ("printf 'Welcome to the site\\n\\nslurm_load_jobs error: no' >&2; exit 1",
         "squeue failed: slurm_load_jobs error: no"),
        ("printf 'out of order\\377' >&2; exit 3", "squeue failed: out of order\ufffd"),
        ("exit 7", "squeue failed: exit code 7"),
        ("exec sleep 60", "squeue did not answer within 1 s"),
        (None, "squeue not found; run this on a machine with SLURM's commands"),
    ],
)  # fmt: skip
def test_a_failed_command_is_one_line(
    commands: Path, monkeypatch: pytest.MonkeyPatch, body: str | None, error: str
) -> None:
    if body is None:
        monkeypatch.setenv("PATH", str(commands))
    else:
        command(commands, "squeue", body)
    if "answer" in error:
        monkeypatch.setattr(states, "TIMEOUT", 1)
    with pytest.raises(UserError) as raised:
        states.known_jobs()
    assert str(raised.value) == error
    assert states.ended_jobs(["1"], {}) == {}  # no accounting either


def test_jobs_that_are_gone_are_cancelled_without_ado(commands: Path) -> None:
    answering(commands, "scancel", "")
    states.cancel_jobs([])
    assert not (commands / "scancel.arguments").exists()
    states.cancel_jobs(["1", "2_3"])
    assert (commands / "scancel.arguments").read_text() == "1 2_3 "
    command(commands, "scancel", "echo 'scancel: error: Invalid job id 1' >&2; exit 1")
    states.cancel_jobs(["1"])
