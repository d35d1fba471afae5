"""Submissions on disk: complete at any moment, whoever was killed."""

import json
import os
from pathlib import Path

import pytest

from g2rpo.config import validate
from g2rpo.errors import UserError
from slurm.cluster import Cluster
from slurm.graph import Graph, Needs, Stage
from slurm.submission import JobGroup, Submission, job_groups, list_submissions, new_folder

STAGES = (
    Stage("embed", "embed", "all prompts", lease="/runs/leases/embed"),
    Stage("train/a", "train", "hps/g2rpo, seed 1", {"cell": "a.json", "share": [0, 1]},
          ("embed",), (), Needs(16, 16, 60, 400)),
    *(Stage(f"score/a/{index}", "score", "hps/g2rpo", {"share": [index, 2]}, ("train/a",),
            resources=Needs(1, 1), array="score/a") for index in range(2)),
    Stage("render", "render", "Table 1", after=("score/a/0", "score/a/1")),
)  # fmt: skip


def submission_in(folder: Path) -> Submission:
    settings = {
        "name": "site",
        "partition": "gpu",
        "mail": {"user": "me"},
        "extra": {"reservation": "course", "nice": 3, "reboot": True},
        "container": {"kind": "podman", "image": "g2rpo", "mounts": ["/a:/b"]},
        "environment": {"HF_HOME": "/hub"},
    }
    cluster = validate(Cluster, settings, "test")
    graph, done = Graph(STAGES), frozenset({"embed"})
    return Submission(folder, "table1, profile flux", "m:f", Path("/x"), cluster, graph, 1.5, done)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    submission = submission_in(tmp_path / "one")
    submission.save()
    loaded = Submission.load(submission.folder)
    for name in ("folder", "title", "entry", "directory", "cluster", "created", "done"):
        assert getattr(loaded, name) == getattr(submission, name), name
    assert loaded.graph.stages == submission.graph.stages
    assert list(loaded.graph.stages) == list(submission.graph.stages)


@pytest.mark.parametrize("text", [None, "", '{"format": 1, "ti', '{"format": 99}'])
def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "submission.json").write_text(text)
    with pytest.raises(UserError, match="submit again") as told:
        Submission.load(tmp_path)
    assert "submission.json" in str(told.value) and "\n" not in str(told.value)


def test_groups_say_which_job_a_stage_has(tmp_path: Path) -> None:
    submission = submission_in(tmp_path)
    assert job_groups(tmp_path) == []
    submission.announce("c1", ["train/a"])
    submission.submitted("c1", "17")
    submission.announce("c2", ["score/a/0", "score/a/1"])
    first, second = job_groups(tmp_path)
    assert (first.job, first.stages, first.job_of("train/a")) == ("17", ("train/a",), "17")
    assert first.submitted > 0
    # Killed right after sbatch: it is found by its comment, and has no id yet.
    assert (second.comment, second.job, second.job_of("score/a/1")) == ("c2", None, None)
    submission.submitted("c2", "18")
    assert job_groups(tmp_path)[1].job_of("score/a/1") == "18_1"
    assert [group.comment for group in job_groups(tmp_path)] == ["c1", "c2"]


def test_a_line_cut_short_by_a_kill_takes_no_other_with_it(tmp_path: Path) -> None:
    submission = submission_in(tmp_path)
    submission.announce("c1", ["train/a"])
    submission.submitted("c1", "17")
    path = tmp_path / "jobs.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert all(isinstance(group, JobGroup) for group in job_groups(tmp_path))
        submission.announce("c2", ["render"])
        submission.submitted("c2", "18")
        assert job_groups(tmp_path)[-1].job_of("render") == "18", cut
    lines = whole.splitlines()
    path.write_bytes(lines[0] + b"\n" + lines[1][: len(lines[1]) // 2])
    assert job_groups(tmp_path) == [
        JobGroup("c1", ("train/a",), None, json.loads(lines[0])["time"])
    ]


def test_submissions_are_listed_by_age(tmp_path: Path) -> None:
    folders = [new_folder(tmp_path, name) for name in ("z-mini", "a-mini", "a-mini")]
    assert len(set(folders)) == 3
    for age, folder in enumerate(folders):
        submission_in(folder).save()
        os.utime(folder / "submission.json", (1000 + age, 1000 + age))
    new_folder(tmp_path, "b-mini")  # killed before it was saved
    assert list_submissions(tmp_path) == folders
    assert list_submissions(tmp_path / "absent") == []


def test_logs_of_stages_do_not_meet(tmp_path: Path) -> None:
    submission = submission_in(tmp_path)
    logs = {submission.local_log(stage.name) for stage in STAGES}
    assert len(logs) == len(STAGES)
    assert {log.parent for log in logs} == {tmp_path / "logs"}
