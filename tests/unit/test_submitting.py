"""Submitting when SLURM rejects or forgets jobs, or the submitting shell is killed at any point."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from small_plan import small_plan
from submitit.core import utils

from g2rpo.errors import UserError
from reproduce.jobs.launch import submit_to_slurm
from reproduce.jobs.plan import Plan
from reproduce.jobs.status import read_status
from reproduce.stages.embedding import Embed
from slurm import states
from slurm.cluster import Cluster
from slurm.submission import Submission, list_submissions, read_comment

CLUSTER = Cluster(name="site")


class KilledError(BaseException):
    """The shell that submits is gone."""


class Slurm:
    """A SLURM whose jobs wait for ever; ``accident`` is called around each sbatch."""

    def __init__(self) -> None:
        self.comments: dict[str, str] = {}
        self.dependencies: dict[str, str] = {}
        self.states: dict[str, str] = {}
        self.count = 0
        self.accident: Callable[[str, int], None] = lambda when, number: None

    def ask(self, command: str, *arguments: str, seconds: float = 0.0) -> str:
        del seconds
        if command == "scancel":
            self.states |= dict.fromkeys(arguments, "CANCELLED")
        if command != "squeue":
            return ""
        lines = (f"{job}|{self.states[job]}|None||{self.comments[job]}" for job in self.states)
        return "\n".join(lines)

    def sbatch(self, text: str) -> str:
        self.count += 1
        self.accident("before", self.count)
        job = str(100 + self.count)
        flags = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
        array = re.match(r"0-(\d+)", flags.get("array", ""))
        tasks = [f"{job}_{n}" for n in range(int(array[1]) + 1)] if array else [job]
        for task in tasks:
            self.states[task], self.comments[task] = "PENDING", flags["comment"].strip("'")
            self.dependencies[task] = flags.get("dependency", "").strip("'")
        self.accident("after", self.count)
        return f"Submitted batch job {job} on cluster site\n"

    def stages(self) -> dict[str, str]:
        """The job of each stage that waits or runs; each has one."""
        found: dict[str, str] = {}
        for job, state in self.states.items():
            if state not in ("PENDING", "RUNNING"):
                continue
            named = read_comment(self.comments[job])
            assert named is not None
            stage = named[1][int(job.partition("_")[2] or 0)]
            assert stage not in found or stage.startswith("render/"), stage
            found[stage] = job
        return found


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    made = Slurm()
    monkeypatch.setattr(states, "ask", made.ask)

    def command(words: list[str], verbose: bool) -> Callable[[], str]:
        return lambda: made.sbatch(Path(words[-1]).read_text())

    monkeypatch.setattr(utils, "CommandFunction", command)  # submitit runs sbatch by it
    return made


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A base and a training, both sampled and scored in three shares."""
    return small_plan(tmp_path, shares=3)


def kill_at(moment: str, number: int) -> Callable[[str, int], None]:
    def accident(when: str, count: int) -> None:
        if (when, count) == (moment, number):
            raise KilledError

    return accident


@pytest.mark.parametrize("number", [1, 4, 7])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_any_point_each_stage_gets_one_job(
    slurm: Slurm, plan: Plan, moment: str, number: int
) -> None:
    slurm.accident = kill_at(moment, number)
    with pytest.raises(KilledError):
        submit_to_slurm(plan, CLUSTER)
    slurm.accident = lambda *_: None
    before = slurm.stages()
    submission = submit_to_slurm(plan, CLUSTER)
    after = slurm.stages()
    assert after.keys() == plan.todo.stages.keys()
    assert all(after[stage] == job for stage, job in before.items() if "render" not in stage)
    assert "CANCELLED" not in slurm.states.values()
    for stage in plan.todo.stages.values():
        waits = re.findall(r"\d+(?:_\d+)?", slurm.dependencies[after[stage.name]])
        jobs = {after[name] for name in (*stage.needs, *stage.after)}
        assert {job for job in jobs if not {job, states.array_of(job)} & set(waits)} == set()
    latest = submission or Submission.load(list_submissions(plan.layout.runs / "submissions")[-1])
    assert {status.word for status in read_status(latest)} == {"waiting"}
    assert submit_to_slurm(plan, CLUSTER) is None
    assert slurm.stages() == after


def test_killed_while_it_notes_a_job(slurm: Slurm, plan: Plan) -> None:
    first = submit_to_slurm(plan, CLUSTER)
    assert first is not None
    before, path = slurm.stages(), first.folder / "jobs.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for left in (b"", lines[0][:30], b"".join(lines[:3]) + lines[3][:-4], whole[:-1]):
        path.write_bytes(left)
        assert submit_to_slurm(plan, CLUSTER) is None
        assert slurm.stages() == before
        assert {status.word for status in read_status(first)} == {"waiting"}


@pytest.mark.parametrize("state", ["CANCELLED", "FAILED", None])
def test_only_the_task_that_ended_is_submitted_again(
    slurm: Slurm, plan: Plan, state: str | None
) -> None:
    submit_to_slurm(plan, CLUSTER)
    before = slurm.stages()
    sampled = [name for name in before if name.startswith("sample/") and "-of-003" in name]
    array = states.array_of(before[sampled[0]])
    lost = next(name for name in sampled if before[name] == f"{array}_1")
    others = [f"{array}_0", f"{array}_2"]
    slurm.states[others[0]] = "RUNNING"
    if state is None:  # no list has it any more
        del slurm.states[before[lost]]
    else:
        slurm.states[before[lost]] = state
    assert submit_to_slurm(plan, CLUSTER) is not None
    after = slurm.stages()
    changed = {name for name in before if before[name] != after[name]}
    scores = {name for name in before if lost in plan.graph[name].needs}
    assert changed == {lost, *scores, *(name for name in before if name.startswith("render/"))}
    for name in scores:
        assert slurm.states[before[name]] == "CANCELLED"
        waits = slurm.dependencies[after[name]]
        assert waits == f"afterok:{others[0]}:{after[lost]}:{others[1]}", waits


def test_a_job_that_ended_well_is_waited_for_by_nobody(
    slurm: Slurm, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stage is done when sbatch is called, though it was not when the plan was made."""
    (prompts,) = (stage for stage in plan.stages.values() if isinstance(stage, Embed))
    monkeypatch.setattr(Embed, "is_done", lambda _: True)
    submit_to_slurm(plan, CLUSTER)
    found = slurm.stages()
    assert prompts.name in plan.todo.stages and prompts.name not in found
    firsts = [name for name in found if plan.graph[name].needs == (prompts.name,)]
    assert firsts and {slurm.dependencies[found[name]] for name in firsts} == {""}


@pytest.mark.parametrize("times", [2, 99])
def test_a_job_that_slurm_forgot_between_is_looked_for_again(
    slurm: Slurm, plan: Plan, times: int
) -> None:
    def accident(when: str, number: int) -> None:
        if when == "before" and 2 <= number < 2 + times:
            raise utils.FailedJobError("sbatch: error: Job dependency problem")

    slurm.accident = accident
    if times == 99:
        with pytest.raises(UserError, match=r"cannot submit .*dependency problem") as told:
            submit_to_slurm(plan, CLUSTER)
        assert "\n" not in str(told.value) and len(slurm.stages()) == 1
        return
    submit_to_slurm(plan, CLUSTER)
    assert slurm.stages().keys() == plan.todo.stages.keys()


def test_an_sbatch_that_gives_no_id_is_one_line(
    slurm: Slurm, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "sbatch", lambda _: "Submitted\n")
    with pytest.raises(UserError, match="sbatch returned no job id") as told:
        submit_to_slurm(plan, CLUSTER)
    assert "\n" not in str(told.value)
