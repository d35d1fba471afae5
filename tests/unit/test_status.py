"""The word for every stage, from lease files and jobs alone."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from g2rpo.attempts import Record, WorkProgress
from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.owner import Owner
from reproduce import finished
from reproduce.display import status_table, summary
from reproduce.experiment import Experiment, expand, load_profile
from reproduce.launch import (
    DRIVER,
    active_stages,
    hopeless_jobs,
    latest_submission,
    left_to_submit,
    save_submission,
)
from reproduce.layout import Layout
from reproduce.plan import Plan, make_plan
from reproduce.status import Show, StageStatus, follow, is_over, read_status
from slurm import states
from slurm.cluster import Cluster
from slurm.states import JobState
from slurm.submission import Submission

TABLE: dict[str, Any] = {
    "name": "t",
    "cells": {"base": {}, "hps/a": {"method": "g2rpo", "train": ["hps"]}},
    "table": {
        "name": "t", "title": "A table", "baseline": "base",
        "rows": [{"key": "base", "label": "Base"}, {"key": "hps/a", "label": "A"}],
        "columns": [{"reward": "hps", "label": "HPS"}],
    },
}  # fmt: skip
GONE = Owner.this_process().model_copy(update={"process_start": 1.0})


class Site:
    """A submission of a base and one training, and a SLURM that says what it is told to."""

    def __init__(self, folder: Path, kind: str) -> None:
        profile = load_profile("mini")
        experiment = validate(Experiment, TABLE, "test")
        cells = expand(experiment, profile, (1,))
        layout = Layout(folder / "runs", folder / "runs")
        self.plan: Plan = make_plan(experiment, profile, cells, layout)
        cluster = validate(Cluster, {"name": "site", "kind": kind}, "test")
        self.submission: Submission = save_submission(self.plan, cluster)
        self.active: dict[str, JobState] = {}
        self.ended: dict[str, JobState] = {}
        self.names = {
            f"{stage.kind} {stage.label.split(',')[0]}": stage.name
            for stage in self.plan.graph.stages.values()
        }

    def submitted(self, name: str, job: str) -> None:
        self.submission.announce(f"c{job}", [self.names[name]])
        self.submission.submitted(f"c{job}", job)

    def job(self, name: str, job: str, state: str, reason: str = "") -> None:
        self.submitted(name, job)
        self.tell(job, state, reason)

    def tell(self, job: str, state: str, reason: str = "") -> None:
        found = JobState(job, state, reason, "node07", f"c{job}")
        (self.active if found.active else self.ended)[job] = found

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
        monkeypatch.setattr(states, "active_jobs", lambda: dict(made.active))
        monkeypatch.setattr(
            states, "ended_jobs", lambda ids: {job: made.ended[job] for job in ids
                                               if job in made.ended}
        )  # fmt: skip
        return made

    return make


TRAIN, SAMPLE, SCORE = (f"{kind} hps/a" for kind in ("train", "sample", "score"))
EMBED, RENDER = "embed all prompts", "render A table"


def test_jobs_that_wait_or_start(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    here.job(EMBED, "1", "RUNNING")
    here.job(TRAIN, "2", "PENDING", "Dependency")
    here.job(SAMPLE, "3", "PENDING", "Priority")
    assert here.word(EMBED) == ("starting", "")
    assert here.word(TRAIN) == ("waiting", "waiting for the stages that it needs")
    assert here.word(SAMPLE) == ("waiting", "waiting behind jobs of higher priority")
    assert here.word(SCORE) == ("interrupted", "it was not started")
    found = here.read()
    assert (found[TRAIN].job, found[EMBED].node) == ("2", "node07")


def test_a_running_stage_says_how_far_it_is(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    here.job(TRAIN, "2", "RUNNING")
    here.attempt(TRAIN, "stopped", owner=GONE)
    progress = WorkProgress(description="training", done=15, total=30, remaining_seconds=90)
    here.attempt(TRAIN, "running", number=2, progress=progress)
    status = here.read()[TRAIN]
    assert (status.word, status.restarts, status.share_done) == ("running", 1, 0.5)
    assert status.remaining == 90 and status.started > 0


def test_a_requeued_job_is_not_running(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    here.job(TRAIN, "2", "PENDING", "BeginTime")
    here.attempt(TRAIN, "stopped", reason="the time limit is near", owner=GONE)
    word, reason = here.word(TRAIN)
    assert word == "waiting" and "requeued" in reason
    # Killed without a word: its owner is gone, whatever its file says.
    here.attempt(TRAIN, "running", owner=GONE)
    assert here.word(TRAIN)[0] == "waiting"


def test_what_failed_says_why_and_cancels_what_needs_it(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    for number, name in enumerate((TRAIN, SAMPLE, SCORE), start=2):
        here.submitted(name, str(number))
    here.tell("2", "FAILED", "2:0")
    here.tell("3", "CANCELLED")
    here.attempt(TRAIN, "failed", reason="the loss is not finite", owner=GONE)
    assert here.word(TRAIN) == ("failed", "the loss is not finite")
    assert here.word(SAMPLE) == ("cancelled", "train hps/a, seed 1 failed")
    assert here.word(SCORE) == ("cancelled", "sample hps/a, seed 1 cancelled")
    assert here.word("sample base") == ("interrupted", "it was not started")


@pytest.mark.parametrize(
    ("state", "reason", "word", "told"),
    [
        ("FAILED", "1:0", "failed", "failed (exit code 1:0)"),
        ("TIMEOUT", "0:0", "failed", "ran into its time limit"),
        ("OUT_OF_MEMORY", "0:125", "failed", "memory_gb_per_task"),
        ("NODE_FAIL", "", "failed", "its node failed"),
        ("CANCELLED", "0:0", "cancelled", "its job was cancelled"),
        ("COMPLETED", "0:0", "failed", "its job ended but its outputs are not there"),
    ],
)
def test_jobs_that_ended_without_a_word(
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
    assert here.word(TRAIN) == ("interrupted", "SLURM does not know its job any more")
    # The id was given to somebody else's job.
    here.active["2"] = JobState("2", "RUNNING", comment="another submission")
    assert here.word(TRAIN)[0] == "interrupted"


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
    monkeypatch.setattr(finished, "is_trained", lambda *_: True)
    here.attempt(RENDER, "done", owner=GONE)
    assert here.word(TRAIN) == ("done", "") and here.word(RENDER) == ("done", "")
    assert here.read()[TRAIN].share_done == 1.0


def test_on_this_machine_stages_wait_while_the_driver_lives(site: Callable[[str], Site]) -> None:
    here = site("local")
    assert here.word(TRAIN) == ("interrupted", "it was not started")
    here.attempt(DRIVER, "running")
    word, reason = here.word(TRAIN)
    assert word == "waiting" and "free device" in reason
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


def test_the_table_counts_and_tells(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    here.job(TRAIN, "2", "FAILED", "1:0")
    statuses = list(here.read().values())
    assert summary(statuses) == "1 failed, 2 cancelled, 4 interrupted"
    assert status_table(statuses).row_count == len(statuses)
    many = statuses * 10
    assert status_table(many).row_count == 40 + 1
    assert status_table(many, everything=True).row_count == len(many)


def test_following_outlives_a_slurm_that_does_not_answer(
    site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site("slurm")
    here.job(TRAIN, "2", "RUNNING")
    answers: list[Any] = [UserError("squeue did not answer"), dict(here.active), {}]

    def active_jobs() -> dict[str, JobState]:
        answer = answers.pop(0)
        if isinstance(answer, UserError):
            raise answer
        return dict(answer)

    monkeypatch.setattr(states, "active_jobs", active_jobs)
    told: list[str] = []

    class Told(Show):
        def update(self, statuses: list[StageStatus]) -> None:
            told.extend(s.word for s in statuses if s.stage.name == here.names[TRAIN])

        def trouble(self, message: str) -> None:
            told.append(message)

    follow(here.submission, Told(), every=0.0)
    assert told == ["squeue did not answer", "starting", "interrupted"]


def test_what_has_a_job_is_not_submitted_again(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    runs = here.plan.layout.runs
    array = [here.names["sample base"], here.names["score base"]]
    here.submission.announce("array", array)  # killed before the id was written
    here.active = {
        "7_0": JobState("7_0", "RUNNING", comment="array"),
        "8": JobState("8", "PENDING", comment="somebody's own"),
    }
    assert active_stages(runs) == {array[0]: "7_0"}
    left = [stage.name for stage in left_to_submit(here.plan, {array[0]: "7_0"})]
    assert array[0] not in left and array[1] in left
    everything = {stage.name: "1" for stage in here.plan.todo.stages.values()}
    assert left_to_submit(here.plan, everything) == []
    del everything[array[1]]
    kinds = [stage.kind for stage in left_to_submit(here.plan, everything)]
    assert kinds == ["score", "render"]


def test_the_latest_submission_is_found_by_name(site: Callable[[str], Site]) -> None:
    here = site("local")
    runs = here.plan.layout.runs
    assert latest_submission(runs).name == here.submission.name
    assert latest_submission(runs, "t").name == here.submission.name
    assert latest_submission(runs, here.submission.name).name == here.submission.name
    with pytest.raises(UserError, match="no submission 'table1'"):
        latest_submission(runs, "table1")
    with pytest.raises(UserError, match="nothing was submitted"):
        latest_submission(runs / "absent")
    path = here.submission.folder / "submission.json"
    path.write_text(json.dumps({"format": 0}))
    with pytest.raises(UserError, match="another version"):
        latest_submission(runs)


def test_a_job_that_waits_for_a_failed_stage_is_hopeless(site: Callable[[str], Site]) -> None:
    here = site("slurm")
    runs = here.plan.layout.runs
    graph = here.plan.graph.stages
    score, sample = here.names["score base"], here.names["sample base"]
    other = here.names[TRAIN]
    for number, stage in enumerate((sample, score, other)):
        here.submission.announce(f"job {number}", [stage])
    # Its sampling has no job any more and is not done; the training is another matter.
    active = {score: "2", other: "3"}
    assert sample in graph[score].needs and sample not in graph[other].needs
    assert hopeless_jobs(runs, active) == {score: "2"}
    assert hopeless_jobs(runs, {**active, sample: "1"}) == {}
