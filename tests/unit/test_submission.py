"""Submissions on disk: complete at any moment, whoever was killed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from g2rpo.config import validate
from slurm.cluster import Cluster
from slurm.graph import Graph, Needs, Stage
from slurm.submission import (
    DamagedRecord,
    JobGroup,
    Submission,
    job_groups,
    list_submissions,
    new_folder,
)

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


FIRST, SECOND = "g2rpo/table1/1a/train/a", "g2rpo/table1/2b/score/a/{0,1}"
DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda whole: "",
    "cut short": lambda whole: whole[: len(whole) // 2],
    "not JSON": lambda whole: "\0" * len(whole),
    "another type": lambda whole: "[1, 2]",
    "a number": lambda whole: "7",
    "a newer version": lambda whole: whole.replace('"format": 2', '"format": 3'),
    "a key is missing": lambda whole: whole.replace('"entry"', '"entries"'),
    "a value of another type": lambda whole: whole.replace("1.5", '"yesterday"'),
    "stages of another type": lambda whole: whole.replace('"needs": [],', '"needs": 7,'),
    "a stage that is not there": lambda whole: whole.replace('"name": "embed"', '"name": "x"'),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "gone", "a folder"])
def test_a_damaged_record_is_set_aside_and_its_copy_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    submission = submission_in(tmp_path / "one")
    submission.save()
    record, copy = (tmp_path / "one" / name for name in ("submission.json", "submission-copy.json"))
    os.utime(copy, (1000, 1000))
    whole = record.read_text()
    record.unlink()
    if damage == "a folder":
        record.mkdir()
    elif damage != "gone":
        record.write_text(DAMAGES[damage](whole))
        assert record.read_text() != whole
    loaded = Submission.load(submission.folder)
    assert loaded.graph.stages == submission.graph.stages and loaded.cluster == submission.cluster
    (line,) = caplog.messages
    assert str(record) in line and "set aside as submission.json.damaged" in line
    assert record.read_text() == whole and record.stat().st_mtime == 1000
    assert (tmp_path / "one" / "submission.json.damaged").exists() == (damage != "gone")
    assert Submission.load(submission.folder).title == submission.title
    assert len(caplog.messages) == 1
    if damage in DAMAGES:
        for path in (record, copy):
            path.write_text(DAMAGES[damage](whole))
        with pytest.raises(DamagedRecord) as told:
            Submission.load(submission.folder)
        assert "submission.json: " in str(told.value) and "\n" not in str(told.value)


def test_groups_say_which_job_a_stage_has(tmp_path: Path) -> None:
    submission = submission_in(tmp_path)
    assert job_groups(tmp_path) == []
    submission.submitted(FIRST, ["train/a"], "17")
    submission.submitted(SECOND, ["score/a/0", "score/a/1"], "18")
    first, second = job_groups(tmp_path)
    assert (first.stages, first.job_of("train/a")) == (("train/a",), "17")
    assert (second.comment, second.job_of("score/a/1")) == (SECOND, "18_1")


def test_a_line_cut_short_by_a_kill_takes_no_other_with_it(tmp_path: Path) -> None:
    submission = submission_in(tmp_path)
    submission.submitted(FIRST, ["train/a"], "17")
    path = tmp_path / "jobs.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert job_groups(tmp_path) in ([], [JobGroup(FIRST, ("train/a",), "17")])
        submission.submitted(SECOND, ["render"], "18")
        assert job_groups(tmp_path)[-1] == JobGroup(SECOND, ("render",), "18"), cut


def test_submissions_are_listed_by_age(tmp_path: Path) -> None:
    folders = [new_folder(tmp_path, name) for name in ("z-mini", "a-mini", "a-mini")]
    assert len(set(folders)) == 3
    for age, folder in enumerate(folders):
        submission_in(folder).save()
        os.utime(folder / "submission.json", (1000 + age, 1000 + age))
    new_folder(tmp_path, "b-mini")  # killed before it was saved
    assert list_submissions(tmp_path) == folders
    assert list_submissions(tmp_path / "absent") == []
