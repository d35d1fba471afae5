"""Submissions on disk: complete at any moment, whoever is killed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from g2rpo.config import validate
from slurm.cluster import Cluster
from slurm.graph import Needs, Stage
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
          ("embed",), (), Needs(16, 16, 400)),
    *(Stage(f"score/a/{index}", "score", "hps/g2rpo", {"share": [index, 2]}, ("train/a",),
            resources=Needs(1, 1), array="score/a") for index in range(2)),
    Stage("render", "render", "Table 1", after=("score/a/0", "score/a/1")),
)  # fmt: skip
FIRST, SECOND = "g2rpo/table1/1a/train/a", "g2rpo/table1/2b/score/a/{0,1}"


def submission_in(folder: Path) -> Submission:
    settings = {
        "name": "site",
        "partition": "gpu",
        "mail": {"user": "me"},
        "extra": {"reservation": "course", "nice": 3, "reboot": True},
        "container": {"kind": "podman", "image": "g2rpo", "mounts": ["/a:/b"]},
        "environment": {"HF_HOME": "/hub"},
    }
    return Submission(
        folder=folder, title="table1, profile flux", entry="m:f", directory=Path("/x"),
        cluster=validate(Cluster, settings, "test"), created=1.5, done=frozenset({"embed"}),
        stages=STAGES,
    )  # fmt: skip


DAMAGES: dict[str, Callable[[str], str]] = {
    "cut short": lambda whole: whole[: len(whole) // 2],
    "another type": lambda whole: "[1, 2]",
    "another version": lambda whole: whole.replace('"format": 2', '"format": 3'),
    "a key is missing": lambda whole: whole.replace('"entry"', '"entries"'),
    "a value of another type": lambda whole: whole.replace("1.5", '"yesterday"'),
    "unknown dependency": lambda whole: whole.replace('"name": "embed"', '"name": "x"'),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "gone", "a folder"])
def test_a_record_is_read_as_saved_or_rejected_in_one_line(tmp_path: Path, damage: str) -> None:
    submission = submission_in(tmp_path / "one")
    submission.save()
    assert Submission.load(submission.folder) == submission
    record = tmp_path / "one" / "submission.json"
    whole = record.read_text()
    record.unlink()
    if damage == "a folder":
        record.mkdir()
    elif damage != "gone":
        record.write_text(DAMAGES[damage](whole))
        assert record.read_text() != whole
    with pytest.raises(DamagedRecord) as error:
        Submission.load(submission.folder)
    assert str(error.value).startswith(f"{record}: damaged") and "\n" not in str(error.value)


def test_job_groups_survive_lines_cut_short(tmp_path: Path) -> None:
    submission = submission_in(tmp_path)
    assert job_groups(tmp_path) == []
    submission.submitted(FIRST, ["train/a"], "17")
    path = tmp_path / "jobs.jsonl"
    whole = path.read_bytes()
    first = JobGroup(comment=FIRST, stages=("train/a",), job="17")
    assert first.job_of("train/a") == "17"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert job_groups(tmp_path) in ([], [first])
        submission.submitted(SECOND, ["score/a/0", "score/a/1"], "18")
        latest = job_groups(tmp_path)[-1]
        assert (latest.comment, latest.job_of("score/a/1")) == (SECOND, "18_1"), cut


def test_submissions_are_listed_by_age(tmp_path: Path) -> None:
    folders = [new_folder(tmp_path, name) for name in ("z-mini", "a-mini", "a-mini")]
    assert len(set(folders)) == 3
    for age, folder in enumerate(folders):
        submission_in(folder).save()
        os.utime(folder / "submission.json", (1000 + age, 1000 + age))
    new_folder(tmp_path, "b-mini")  # killed before it was saved
    assert list_submissions(tmp_path) == folders
    assert list_submissions(tmp_path / "absent") == []
