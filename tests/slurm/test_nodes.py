"""What becomes of a job when its node fails."""

import time
from pathlib import Path
from typing import Any

import pytest
from harness import NODES, Cluster
from job_functions import Tick, events
from submission import executor

pytestmark = pytest.mark.slurm


def _ticks(folder: Path, node: str) -> list[dict[str, Any]]:
    return [line for line in events(folder, "tick") if line["node"] == node]


def test_job_of_a_dead_node_starts_on_another(cluster: Cluster, folder: Path) -> None:
    job = executor(folder).submit(Tick(folder, 600))
    cluster.wait(lambda: events(folder, "tick"), "started job")
    node = str(cluster.fields(job.job_id)["NodeList"])
    (other,) = set(NODES) - {node}
    cluster.kill_node(node)
    assert cluster.step_daemons(node) == []
    died = time.time()
    cluster.wait(lambda: _ticks(folder, other), "second start on the other node")
    assert _ticks(folder, node)[-1]["time"] < died
    assert cluster.fields(job.job_id)["Restarts"] == "1"
    cluster.wait_states(job.job_id, ["NODE_FAIL", "RUNNING"])
