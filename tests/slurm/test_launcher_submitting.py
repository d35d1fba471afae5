"""Submitting twice, half, and again: no stage ever has two jobs, and nothing done is lost.

Most jobs here are held, so that they stay where they are and cost nothing.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Cluster
from launcher import Workplace, interrupt, slow_sbatch, wait_exit

from slurm.states import array_of
from slurm.submission import read_comment

pytestmark = pytest.mark.slurm
HELD = {"extra": {"hold": True}}


def _comments(cluster: Cluster) -> dict[str, str]:
    """The comment of every job that waits or runs, by id."""
    text = cluster.run("squeue", "--array", "--noheader", "--format=%i %k")
    return dict(line.split(" ", 1) for line in text.splitlines())


def _assert_each_stage_has_one_job(place: Workplace) -> None:
    """As SLURM knows it: by the comments of jobs, whatever the submissions say of ids."""
    submission = place.submission()
    stages = len(submission.graph) - len(submission.done)
    comments = _comments(place.cluster)
    named = [read_comment(comment) for comment in set(comments.values())]
    found = [name for one in named if one is not None for name in one[1]]
    tables = [name for name in found if name.startswith("render/")]
    assert len(found) == len(set(found)) + len(tables) - 1, found
    assert len(comments) == len(found)
    assert len(set(found)) == stages


def test_two_submissions_at_once(cluster: Cluster, places: Callable[..., Workplace]) -> None:
    place = places("base", "hps/g2rpo")
    place.profile(ranks=1, shares=2)
    place.cluster_profile(**HELD)
    both = [place.start(*place.request("reproduce", "--detach")) for _ in range(2)]
    ends = [wait_exit(process) for process in both]
    assert [code for code, _, _ in ends] == [0, 0], ends
    errors = [error for _, _, error in ends]
    assert sum("submitted rows-" in text for text in errors) == 1, errors
    assert sum("already queued or running" in text for text in errors) == 1, errors
    _assert_each_stage_has_one_job(place)
    assert len(place.alive()) == 10  # 4 sample, 4 score, train, render
    lines = place.g2rpo("status").stdout.splitlines()
    assert sum("held; release it" in line for line in lines) >= 3, lines


def test_submitting_shell_is_killed_after_a_job_nobody_noted(
    cluster: Cluster, places: Callable[..., Workplace], tmp_path: Path
) -> None:
    place = places("base")
    place.path = slow_sbatch(tmp_path / "bin", 30)
    submitting = place.start(*place.request("reproduce", "--detach"))
    try:
        cluster.wait(place.alive, "first job")
    finally:
        interrupt(submitting)
    assert place.jobs() == {}  # it was killed before it could note the id
    place.path = None
    done = place.g2rpo(*place.request("reproduce"))
    assert "base" in done.stdout
    assert [len(place.attempts(kind)) for kind in ("sample", "score")] == [1, 1]
    lines = place.g2rpo("status").stdout.splitlines()
    assert lines[-1] == "4 done", lines


def test_one_task_of_an_array_is_cancelled(
    cluster: Cluster, places: Callable[..., Workplace]
) -> None:
    place = places("base")
    place.profile(ranks=1, shares=2)
    place.cluster_profile(**HELD)
    place.submit()
    first, second = (place.job(f"sample base, {share}/2") for share in (1, 2))
    scores = [place.job(f"score base, {share}/2") for share in (1, 2)]
    cluster.scancel(second)  # no list of SLURM has it any more
    lines = place.g2rpo("status").stdout.splitlines()
    (second_share,) = (line for line in lines if line.split()[:3] == ["sample", "base,", "2/2"])
    assert "its job was cancelled" in second_share

    place.cluster_profile()
    again = place.start(*place.request("reproduce"))
    try:
        cluster.wait(lambda: len(place.submissions()) == 2, "second submission")
        place.wait_jobs("render")
        waits = cluster.fields(place.job("score base, 1/2"))["Dependency"]
        assert f"afterok:{first}(" in waits and f"{array_of(second)}_*" not in waits, waits
        cluster.run("scontrol", "release", first)
        code, table, error = wait_exit(again)
    finally:
        again.kill()
    assert code == 0 and "base" in table, error
    # Those that waited for the cancelled task are gone: SLURM may have forgotten them too.
    ended = {state for job in scores for state in cluster.job_states(job)}
    assert all(state.startswith("CANCELLED") for state in ended), ended
    kinds = [f"{kind} base, {share}/2" for kind in ("sample", "score") for share in (1, 2)]
    assert [len(place.attempts(kind)) for kind in kinds] == [1, 1, 1, 1]


def test_following_shell_is_killed(cluster: Cluster, places: Callable[..., Workplace]) -> None:
    place = places("base")
    following = place.start(*place.request("reproduce"))
    try:
        place.wait_jobs("render")
        cluster.wait_running(place.job("sample base"))
    finally:
        interrupt(following)
    jobs = place.alive()
    done = place.g2rpo(*place.request("reproduce"))
    assert "already queued or running" in done.stderr
    assert "base" in done.stdout
    assert len(place.submissions()) == 1
    assert len(cluster.run("sacct", "-nXP", f"--jobs={','.join(jobs)}", "-oJobID").split()) == 3
    assert [len(place.attempts(kind)) for kind in ("sample", "score")] == [1, 1]
    # Nothing is left to do.
    place.g2rpo(*place.request("reproduce", "--detach"))
    assert place.alive() == []


def test_cancel_retry_and_scancel(cluster: Cluster, places: Callable[..., Workplace]) -> None:
    place = places("base", "hps/g2rpo")
    place.cluster_profile(**HELD)
    first = place.submit()
    # By hand: what needs the job goes with it, the rest stays; the same command brings them back.
    train = place.job("train hps/g2rpo")
    cluster.scancel(train)
    children = ("sample hps/g2rpo", "score hps/g2rpo")
    for child in children:  # SLURM does not look at the dependencies of what is held
        cluster.run("scontrol", "release", place.job(child))
    cluster.wait(lambda: cluster.state(place.job(children[-1])) == "CANCELLED", "child")
    lines = place.g2rpo("status").stdout.splitlines()
    assert lines[-1].startswith("1 done, 3 waiting, 3 cancelled"), lines
    place.submit()
    assert place.job("train hps/g2rpo") != train
    assert "sample base" not in place.jobs()  # its job of before waits still
    _assert_each_stage_has_one_job(place)

    place.g2rpo("cancel", first.name)
    place.g2rpo("cancel")
    cluster.wait(lambda: place.alive() == [], "end of all jobs")
    retrying = place.start("retry")
    try:
        cluster.wait(lambda: len(place.submissions()) == 3, "third submission")
        place.wait_jobs("render")
        _assert_each_stage_has_one_job(place)
        time.sleep(1)
        _, error = interrupt(retrying, signal.SIGINT)
    finally:
        retrying.kill()
    assert retrying.returncode == 130
    assert "the jobs keep running" in error
    assert len(place.alive()) == 6
