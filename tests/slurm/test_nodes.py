"""What becomes of a job when its node fails."""

import time
from pathlib import Path
from typing import Any

import pytest
from harness import NODES, Cluster
from job_functions import Tick, events
from submission import executor, log

pytestmark = pytest.mark.slurm


def _other(node: str) -> str:
    return NODES[1 - NODES.index(node)]


def _ticks(folder: Path, node: str) -> list[dict[str, Any]]:
    return [line for line in events(folder, "tick") if line["node"] == node]


def _started(cluster: Cluster, folder: Path) -> tuple[Any, str]:
    job = executor(folder).submit(Tick(folder, 600))
    cluster.wait(lambda: events(folder, "tick"), "started job")
    return job, str(cluster.fields(job.job_id)["NodeList"])


@pytest.mark.facts
def test_old_process_survives_the_crash_of_slurmd(cluster: Cluster, folder: Path) -> None:
    job, node = _started(cluster, folder)
    after = cluster.submit("true", f"--dependency=afterok:{job.job_id}")
    cluster.kill_slurmd(node)
    cluster.wait(lambda: _ticks(folder, _other(node)), "second start on the other node")
    assert cluster.node_state(node) == "down*"
    assert cluster.fields(job.job_id)["Restarts"] == "1"
    assert cluster.state(after) == "PENDING"
    # Two processes of one job write into one folder, and nothing has told the older one.
    since = time.time()
    cluster.wait(
        lambda: all(each and each[-1]["time"] > since for each in _both(folder)),
        "ticks of both processes",
    )
    assert events(folder, "SIGTERM") == []
    assert {line["process"] for line in _ticks(folder, node)}.isdisjoint(
        line["process"] for line in _ticks(folder, _other(node))
    )
    assert cluster.job_states(job.job_id)[0] == "NODE_FAIL"
    # Only when slurmd is back does the controller have the old step killed.
    cluster.start_slurmd(node)
    cluster.wait(lambda: not cluster.processes(job.job_id, node), "end of the old process")
    assert f"Node failure on {node}" in log(job)
    assert cluster.state(job.job_id) == "RUNNING"


def _both(folder: Path) -> list[list[dict[str, Any]]]:
    return [_ticks(folder, node) for node in NODES]


def test_job_of_a_dead_node_starts_on_another(cluster: Cluster, folder: Path) -> None:
    job, node = _started(cluster, folder)
    cluster.kill_node(node)
    assert cluster.step_daemons(node) == []
    died = time.time()
    cluster.wait(lambda: _ticks(folder, _other(node)), "second start on the other node")
    assert _ticks(folder, node)[-1]["time"] < died
    assert cluster.fields(job.job_id)["Restarts"] == "1"
    cluster.wait_attempts(job.job_id, ["NODE_FAIL", "RUNNING"])
