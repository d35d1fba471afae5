"""Failing nodes, full disks and unresolvable names: clear errors, and nothing is lost."""

import re
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from harness import NODES, Cluster
from launcher import Workplace, interrupt

pytestmark = pytest.mark.slurm
TRAIN = "train hps/g2rpo"


def test_survivor_of_a_crashed_slurmd_publishes_nothing(
    cluster: Cluster, places: Callable[..., Workplace]
) -> None:
    place = places("hps/g2rpo")
    place.profile(ranks=1, iterations=2000, every=5)
    place.submit()
    job = place.job(TRAIN)
    place.wait_iteration(TRAIN, 1)
    node = cluster.fields(job)["NodeList"]
    survivors = [each for each in cluster.processes(job, node) if "slurm.job" in each.cmdline()]
    assert survivors
    cluster.kill_slurmd(node)
    place.wait_iteration(TRAIN, 2)
    assert cluster.fields(job)["NodeList"] == NODES[1 - NODES.index(node)]
    cluster.wait(lambda: not any(each.is_running() for each in survivors), "end of the survivor")
    assert "has taken over from attempt 1; this process stops writing" in place.log(TRAIN)
    first, second = place.attempts(TRAIN)
    assert (first.state, second.state) == ("failed", "running"), place.log(TRAIN)
    place.wait_iteration(TRAIN, 2)  # the successor continues


def _fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return filler


def test_full_disk(cluster: Cluster, places: Callable[..., Workplace], tmp_path: Path) -> None:
    place = places("hps/g2rpo")
    place.profile(ranks=1, iterations=40, every=1)
    kept = (place.folder / "results").rename(tmp_path / "kept")
    with cluster.small_disk(place.folder / "results", 24) as disk:
        shutil.copytree(kept, disk, dirs_exist_ok=True)
        place.submit()
        job = place.job(TRAIN)
        place.wait_iteration(TRAIN, 1, more=3)
        filler = _fill(disk)
        assert cluster.wait_ended(job) == "FAILED"
        refused = place.g2rpo(*place.request("reproduce", "--detach"), code=2)
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
        assert "full" in refused.stderr or "No space" in refused.stderr
        filler.unlink()
        (failed,) = (
            line for line in place.g2rpo("status").stdout.splitlines() if line.startswith("train")
        )
        assert "failed" in failed, failed
        assert "full" in failed or "No space left" in failed, failed
        done = place.g2rpo(*place.request("reproduce"))
        assert "hps/g2rpo" in done.stdout
        # It resumed from the last whole checkpoint.
        first = re.search(r"train g2rpo: (\d+)/40", place.log(TRAIN))
        assert first is not None, place.log(TRAIN)
        assert int(first.group(1)) > 3


def test_node_whose_name_does_not_resolve(
    cluster: Cluster, places: Callable[..., Workplace]
) -> None:
    place = places("base", "hps/g2rpo")
    place.profile(ranks=2)
    place.cluster_profile(
        tasks_per_node=1, environment={"MASTER_ADDR": "no-such-host"}, extra={"hold": True}
    )
    first = place.submit()
    job = place.job(TRAIN)
    cluster.scancel(place.job("sample base"))
    place.held(TRAIN)
    assert cluster.wait_ended(job) == "FAILED"
    lines = place.g2rpo("status").stdout.splitlines()
    (failed,) = (line for line in lines if line.split()[:2] == ["train", "hps/g2rpo,"])
    assert "cannot resolve the first node's name 'no-such-host'" in failed, failed
    assert "environment: in the cluster profile" in failed

    # Only the failed stage and those that need it, not the one cancelled by hand.
    retrying = place.start("retry", "--failed")
    try:
        cluster.wait(lambda: len(place.submissions()) == 2, "second submission")
        place.wait_jobs("render")
        again = place.jobs()
    finally:
        interrupt(retrying, signal.SIGINT)
    assert sorted(name.split(",")[0] for name in again) == [
        "render Rows",
        "sample hps/g2rpo",
        "score hps/g2rpo",
        TRAIN,
    ]
    assert place.submissions()[0].name == first.name
