"""A whole experiment on the cluster: one cell fails, a training is requeued, the rest finishes."""

import re
from pathlib import Path

import pytest
from harness import Cluster
from launcher import Workplace, wait_exit, without_ids

pytestmark = [pytest.mark.slurm, pytest.mark.core]
GOOD, BROKEN = "train hps/g2rpo", "train hps/broken"


def _check_scripts(place: Workplace, planned: str) -> None:
    """What was submitted is what ``plan --dry-run`` had shown, but for ids."""
    submission = place.submission()
    _, *parts = re.split(r"(?m)^# (?=\w+/)", planned)
    shown = dict(part.split("\n", 1) for part in parts)
    submitted = sorted(submission.jobs_folder.glob("*_submission.sh"))
    assert len(shown) == len(submitted) == 8  # embed, 2 train, 2 sample, 2 score, render
    texts = {without_ids(text, "SUBMISSION") for text in shown.values()}
    for path in submitted:
        assert without_ids(path.read_text(), submission.name) in texts, path.read_text()


def _check_status(place: Workplace) -> None:
    """The failed stage with reason and log, its children cancelled, all else done."""
    lines = place.g2rpo("status").stdout.splitlines()
    states = {tuple(line.split()[:2]): line for line in lines if line.split()[1:2]}
    failed = states["train", "hps/broken,"]
    assert " failed " in failed, failed
    assert "by nan" in failed, failed
    assert f"{place.job(BROKEN)}_0_log.out" in failed
    for kind in ("sample", "score"):
        line = states[kind, "hps/broken,"]
        assert " cancelled " in line, line
        assert re.search(r"hps/broken, seed 1(, ./2)? (failed|cancelled)", line), line
    assert " done " in states["train", "hps/g2rpo,"]
    assert lines[-1] == "7 done, 1 failed, 4 cancelled", lines[-1]


def test_experiment_with_a_requeued_and_a_failing_cell(
    cluster: Cluster, smoke_assets: Path, tmp_path: Path
) -> None:
    place = Workplace(tmp_path, cluster, smoke_assets, ("hps/g2rpo", "hps/broken"))
    place.profile(ranks=4, iterations=4, shares=2)
    planned = place.g2rpo(*place.request("plan", "--dry-run")).stdout
    assert place.alive() == []
    following = place.start(*place.request("reproduce"))
    try:
        place.wait_jobs("render")
        _check_scripts(place, planned)
        place.wait_iteration(GOOD, attempt=1)
        good = place.job(GOOD)
        cluster.scancel(good, "USR2")
        code, table, error = wait_exit(following)
    finally:
        following.kill()
    assert code == 2, error
    assert "1 of 2 cells failed; the first: hps/broken, seed 1" in error
    assert [a.state for a in place.attempts(GOOD)] == ["stopped", "done"], place.log(GOOD)
    assert cluster.fields(good)["Restarts"] == "1"
    assert cluster.state(place.job(BROKEN)) == "FAILED"
    assert "hps/broken" in table
    page = (place.runs / "tiny" / "rows" / "rows.md").read_text()
    assert re.search(r"hps/broken.*missing: .* by nan", page), page
    _check_status(place)
    log = place.g2rpo("logs", "train hps/broken")
    assert "by nan" in log.stdout
    assert f"{place.job(BROKEN)}_0_log.out" in log.stderr
    assert place.alive() == []
