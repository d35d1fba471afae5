"""The state of every stage, from lease files and jobs alone."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_plan import small_plan

from g2rpo.attempts import Record
from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.owner import Owner
from g2rpo.progress import WorkProgress
from reproduce.jobs.display import status_table, summary
from reproduce.jobs.launch import DRIVER, latest_submission, left_to_submit, save_submission
from reproduce.jobs.stage_jobs import active_stages, hopeless_stages
from reproduce.jobs.status import StageStatus, is_over, read_status, readings
from reproduce.stages.training import Train
from slurm import states
from slurm.cluster import Cluster
from slurm.states import JobState
from slurm.submission import Submission, job_comment

GONE = Owner.this_process().model_copy(update={"process_start": 1.0})


class Site:
    """A submission of a base and one training, and a SLURM with given jobs."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.plan = small_plan(folder)
        cluster = validate(Cluster, {"name": "site", "kind": kind}, "test")
        self.submission: Submission = save_submission(self.plan, cluster)
        self.known: dict[str, JobState] = {}
        self.accounts: dict[str, JobState] = {}
        self.names = {
            f"{stage.kind} {stage.label.split(',')[0]}": stage.name
            for stage in self.plan.graph.stages.values()
        }

    def submitted(self, name: str, job: str) -> str:
        stages = [self.names[one] for one in name.split("+")]
        comment = job_comment(self.submission.name, f"c{job}", stages)
        self.submission.submitted(comment, stages, job)
        return comment

    def job(self, name: str, job: str, state: str, reason: str = "") -> None:
        made = JobState(job, state, reason, "node07", self.submitted(name, job))
        (self.known if made.active else self.accounts)[job] = made

    def answer(self, command: str, *_: str) -> str:
        """What squeue and sacct say."""
        if command == "squeue":
            fields, jobs = ("job", "state", "reason", "node", "comment"), self.known
        else:
            fields, jobs = ("job", "state", "reason", "node"), self.accounts
        lines = ("|".join(getattr(job, field) for field in fields) for job in jobs.values())
        return "\n".join(lines)

    def attempt(self, name: str, state: str, number: int = 1, **changes: Any) -> None:
        """Writes an attempt at a stage, or at the driver."""
        driver = self.submission.folder / DRIVER
        lease = driver if name == DRIVER else Path(self.plan.graph[self.names[name]].lease)
        lease.mkdir(parents=True, exist_ok=True)
        fields = {"attempt": number, "owner": Owner.this_process(), "state": state,
                  "started": time.time(), "updated": time.time(), "node": "node03"}  # fmt: skip
        record = Record(**(fields | changes))
        (lease / f"{number:06d}.json").write_text(record.model_dump_json())

    def read(self) -> dict[str, StageStatus]:
        names = {name: short for short, name in self.names.items()}
        return {names[status.stage.name]: status for status in read_status(self.submission)}

    def word(self, name: str) -> tuple[str, str]:
        status = self.read()[name]
        return status.word, status.reason


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Site]:
    def make(kind: str) -> Site:
        made = Site(tmp_path, kind)
        monkeypatch.setattr(states, "ask", made.answer)
        return made

    return make


TRAIN, SAMPLE, SCORE = (f"{kind} hps/a" for kind in ("train", "sample", "score"))
EMBED, RENDER = "embed all prompts", "render A table"


def test_live_jobs(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    here.job(EMBED, "1", "RUNNING")
    here.job(TRAIN, "2", "PENDING", "Dependency")
    here.job(SAMPLE, "3", "PENDING", "Priority")
    assert here.word(EMBED) == ("starting", "")
    assert here.word(TRAIN) == ("waiting", "waiting for the stages it depends on")
    assert here.word(SAMPLE) == ("waiting", "waiting behind jobs of higher priority")
    assert here.word(SCORE) == ("interrupted", "it has not run")
    found = here.read()
    assert (found[TRAIN].job, found[EMBED].node) == ("2", "node07")
    # A requeued job is not running, and neither is one that was killed without a word.
    here.job(TRAIN, "2", "PENDING", "BeginTime")
    here.attempt(TRAIN, "stopped", reason="the time limit is near", owner=GONE)
    word, reason = here.word(TRAIN)
    assert word == "waiting" and "requeued" in reason
    here.attempt(TRAIN, "running", owner=GONE)
    assert here.word(TRAIN)[0] == "waiting"
    here.job(TRAIN, "2", "RUNNING")
    progress = WorkProgress(description="training", done=15, total=30, remaining_seconds=90)
    here.attempt(TRAIN, "running", number=2, progress=progress)
    status = here.read()[TRAIN]
    assert (status.word, status.restarts, status.share_done) == ("running", 1, 0.5)
    assert status.remaining == 90 and status.started > 0


def test_a_failure_has_its_reason_and_cancels_what_needs_it(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    here.job(TRAIN, "2", "FAILED", "2:0")
    here.job(SAMPLE, "3", "CANCELLED")
    here.submitted(SCORE, "4")
    here.attempt(TRAIN, "failed", reason="the loss is not finite", owner=GONE)
    assert here.word(TRAIN) == ("failed", "the loss is not finite")
    assert here.word(SAMPLE) == ("cancelled", "train hps/a, seed 1 failed")
    assert here.word(SCORE) == ("cancelled", "sample hps/a, seed 1 cancelled")
    assert here.word("sample base") == ("interrupted", "it has not run")


@pytest.mark.parametrize(
    ("state", "reason", "word", "told"),
    [
        ("FAILED", "1:0", "failed", "failed (exit code 1:0)"),
        ("TIMEOUT", "0:0", "failed", "timed out before"),
        ("OUT_OF_MEMORY", "0:125", "failed", "memory_gb_per_task"),
        ("CANCELLED", "0:0", "cancelled", "its job was cancelled"),
        ("COMPLETED", "0:0", "failed", "its outputs are missing"),
        ("FAILED", "85:0", "interrupted", "SLURM did not requeue its job"),
    ],
)
def test_jobs_that_ended_without_a_record(
    site: Callable[[str], Site], state: str, reason: str, word: str, told: str
) -> None:
    here = site("slurm")
    here.job(TRAIN, "2", state, reason)
    found = here.word(TRAIN)
    assert found[0] == word and told in found[1]
    if word == "failed":
        log = here.submission.jobs_folder / "2_0_log.out"
        log.parent.mkdir()
        log.write_text("starting\nModuleNotFoundError: No module named 'torch'\nsrun: error: x\n")
        status = here.read()[TRAIN]
        assert status.reason == "ModuleNotFoundError: No module named 'torch'"
        assert status.log == log


def test_a_job_that_slurm_has_forgotten(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    here.submitted(TRAIN, "2")
    assert here.word(TRAIN) == ("interrupted", "SLURM no longer knows its job")
    # Its id was reused for another job.
    here.known["2"] = JobState("2", "RUNNING", comment="another submission")
    assert here.word(TRAIN)[0] == "interrupted"
    # An array whose tasks were cancelled before they started has no indices left.
    comment = here.submitted("sample base+score base", "21")
    here.known = {"21_0": JobState("21_0", "PENDING", "JobHeldUser", "", comment)}
    assert here.word("score base") == ("cancelled", "its job was cancelled")
    here.known = {"21": JobState("21", "CANCELLED", "JobHeldUser", "", comment)}
    assert here.word("sample base")[0] == here.word("score base")[0] == "cancelled"


def test_a_failure_of_an_earlier_submission_is_over(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    here.job(TRAIN, "2", "PENDING", "Priority")
    earlier = here.submission.created - 100
    here.attempt(TRAIN, "failed", reason="then", owner=GONE, updated=earlier, started=earlier)
    assert here.word(TRAIN)[0] == "waiting"
    here.attempt(RENDER, "done", owner=GONE, updated=earlier, started=earlier)
    assert here.word(RENDER)[0] == "interrupted"


def test_what_is_done_is_done_whatever_slurm_says(
    site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site("slurm")
    here.job(TRAIN, "2", "CANCELLED")
    monkeypatch.setattr(Train, "is_done", lambda _: True)
    here.attempt(RENDER, "done", owner=GONE)
    assert here.word(TRAIN) == ("done", "") and here.word(RENDER) == ("done", "")
    assert here.read()[TRAIN].share_done == 1.0


def test_on_this_machine_stages_wait_while_the_driver_lives(site: Callable[[str], Site]) -> None:
    here = site("local")
    assert here.word(TRAIN) == ("interrupted", "it has not run")
    here.attempt(DRIVER, "running")
    assert here.word(TRAIN) == ("waiting", "")
    here.attempt(TRAIN, "running")
    here.attempt("sample base", "failed", reason="a mistake", owner=GONE)
    assert here.word(TRAIN)[0] == "running"
    assert here.word("sample base") == ("failed", "a mistake")
    assert here.word("score base")[0] == "cancelled"
    here.attempt(DRIVER, "running", owner=GONE)
    here.attempt(TRAIN, "stopped", owner=GONE)
    assert here.word(TRAIN) == ("interrupted", "it was stopped")
    assert is_over(here.read().values())
    # An owner elsewhere that has been silent for long.
    elsewhere = Owner.this_process().model_copy(update={"host": "elsewhere"})
    here.attempt(TRAIN, "running", owner=elsewhere)
    assert here.word(TRAIN)[0] == "running"
    path = Path(here.plan.graph[here.names[TRAIN]].lease) / "000001.json"
    os.utime(path, (time.time() - 900, time.time() - 900))
    assert here.word(TRAIN)[0] == "interrupted"


def test_the_table(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    here.job(TRAIN, "2", "FAILED", "1:0")
    statuses = list(here.read().values())
    assert summary(statuses) == "1 failed, 2 cancelled, 4 interrupted"
    assert status_table(statuses).row_count == len(statuses)
    many = statuses * 10
    assert status_table(many).row_count == 40 + 1
    assert status_table(many, everything=True).row_count == len(many)


def test_following_survives_a_slurm_that_does_not_answer(
    site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site("slurm")
    here.job(TRAIN, "2", "RUNNING")
    answers: list[Any] = [UserError("squeue did not answer"), dict(here.known), {}]

    def known_jobs() -> dict[str, JobState]:
        answer = answers.pop(0)
        if isinstance(answer, UserError):
            raise answer
        return dict(answer)

    monkeypatch.setattr(states, "known_jobs", known_jobs)
    told: list[str] = []

    for statuses in readings(here.submission, told.append, every=0.0):
        told.extend(s.word for s in statuses if s.stage.name == here.names[TRAIN])
    away = "SLURM not reachable (squeue did not answer); showing the state of the run folders"
    assert told == [away, "unknown", "starting", "interrupted"]


@pytest.mark.parametrize("record", ["none", "whole", "cut short", "junk"])
def test_a_job_is_known_whatever_was_noted_of_it(site: Callable[[str], Site], record: str) -> None:
    here = site("slurm")
    runs = here.plan.layout.runs
    stages = [here.names["sample base"], here.names["score base"]]
    comment = job_comment(here.submission.name, "c7", stages)
    here.submission.submitted(comment, stages, "7")
    path = here.submission.folder / "jobs.jsonl"
    path.write_text({
        "none": "", "whole": path.read_text(), "cut short": path.read_text()[:40],
        "junk": '[1]\n{"job": 7}\n\0\n{"comment": "x", "stages": ["y"], "job": "z"}',
    }[record])  # fmt: skip
    here.known = {
        "7_0": JobState("7_0", "RUNNING", comment=comment),
        "7_1": JobState("7_1", "CANCELLED", comment=comment),
        "8": JobState("8", "PENDING", comment="somebody's own"),
        "9": JobState("9", "PENDING", comment=f"g2rpo/elsewhere/1a/{stages[1]}"),
    }
    found = active_stages(runs)
    assert {stage: job.job for stage, job in found.items()} == {stages[0]: "7_0"}
    assert here.word("sample base") == ("starting", "")
    assert here.word("score base") == ("cancelled", "its job was cancelled")
    left = [stage.name for stage in left_to_submit(here.plan, found)]
    assert stages[0] not in left and stages[1] in left


def test_a_later_submission_shows_what_the_jobs_of_an_earlier_one_do(
    site: Callable[[str], Site],
) -> None:
    here = site("slurm")
    here.job(TRAIN, "2", "RUNNING")
    here.job(SAMPLE, "3", "PENDING", "Dependency")
    log = here.submission.jobs_folder / "2_0_log.out"
    log.parent.mkdir()
    log.write_text("of the training\n")
    earlier, here.submission = here.submission, save_submission(here.plan, here.submission.cluster)
    here.job(SCORE, "9", "PENDING", "Dependency")
    found = here.read()
    assert (found[TRAIN].word, found[TRAIN].job, found[TRAIN].log) == ("starting", "2", log)
    assert found[SAMPLE].word == found[SCORE].word == "waiting"
    here.submission = earlier
    assert {name: status.word for name, status in here.read().items()} == {
        name: status.word for name, status in found.items()
    }
    # Submitted again by the later one: that is where the stage is now.
    here.known["2"] = replace(here.known["2"], state="FAILED", reason="NonZeroExitCode")
    assert here.word(TRAIN) == ("failed", "failed")
    here.accounts["2"] = replace(here.known["2"], reason="1:0")
    assert here.word(TRAIN) == ("failed", "failed (exit code 1:0)")
    here.submission = save_submission(here.plan, here.submission.cluster)
    here.job(TRAIN, "12", "PENDING", "Priority")
    here.submission = earlier
    assert here.word(TRAIN)[0] == "waiting"


def test_without_slurm_states_come_from_the_run_folders(
    site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site("slurm")
    for number, name in enumerate((EMBED, TRAIN, SAMPLE), start=1):
        here.job(name, str(number), "PENDING")
    here.attempt(EMBED, "running")
    here.attempt(TRAIN, "failed", reason="the loss is not finite", owner=GONE)

    def away() -> dict[str, JobState]:
        raise UserError("squeue failed: slurm_load_jobs error: Unable to contact")

    monkeypatch.setattr(states, "known_jobs", away)
    with pytest.raises(UserError, match="Unable to contact"):
        read_status(here.submission)
    told: list[str] = []
    found = {status.stage.name: status for status in read_status(here.submission, told.append)}
    assert len(told) == 1 and told[0].startswith("SLURM not reachable (squeue failed: slurm_load")
    words = {name: found[here.names[name]].word for name in (EMBED, TRAIN, SAMPLE, SCORE)}
    assert words == {EMBED: "running", TRAIN: "failed", SAMPLE: "unknown", SCORE: "unknown"}
    assert found[here.names[SAMPLE]].reason == "SLURM not reachable"
    assert not is_over(found.values())


def test_the_latest_submission_is_found_by_name(site: Callable[[str], Site]) -> None:
    here = site("local")
    runs = here.plan.layout.runs
    assert latest_submission(runs).name == here.submission.name
    assert latest_submission(runs, "t").name == here.submission.name
    assert latest_submission(runs, here.submission.name).name == here.submission.name
    with pytest.raises(UserError, match="no submission 'table1'"):
        latest_submission(runs, "table1")
    with pytest.raises(UserError, match="no submissions"):
        latest_submission(runs / "absent")
    older, newer = here.submission, save_submission(here.plan, here.submission.cluster)
    os.utime(older.folder / "submission.json", (1, 1))
    assert latest_submission(runs).name == newer.name
    (newer.folder / "submission.json").write_text("")
    assert latest_submission(runs).name == older.name
    with pytest.raises(UserError, match=f"g2rpo cancel {newer.name}"):
        latest_submission(runs, newer.name)


def test_a_job_that_waits_for_what_will_not_come_is_hopeless(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    here.job(EMBED, "1", "RUNNING")
    for number, name in enumerate((SAMPLE, SCORE, "sample base", "score base"), start=3):
        here.job(name, str(number), "PENDING", "Dependency")
    here.submitted(TRAIN, "2")  # it has failed, or was cancelled, and SLURM has forgotten it
    runs = here.plan.layout.runs

    def hopeless() -> set[str]:
        names = {name: short for short, name in here.names.items()}
        return {names[name] for name in hopeless_stages(here.plan, active_stages(runs))}

    assert hopeless() == {SAMPLE, SCORE}
    # The training has a job again, which these do not wait for: SLURM says so of the first.
    here.job(TRAIN, "12", "PENDING", "Priority")
    assert hopeless() == set()
    here.known["3"] = replace(here.known["3"], reason="DependencyNeverSatisfied")
    assert hopeless() == {SAMPLE, SCORE}
    # If a submission cannot be read, its pending jobs would fail; those that run continue.
    (here.submission.folder / "submission.json").write_text("{}")
    assert hopeless() == {TRAIN, SAMPLE, SCORE, "sample base", "score base"}
