"""Jobs whose batch scripts have the launcher's own lines around srun, and that run a function."""

import sys
from pathlib import Path
from typing import Any

import submitit
from harness import Cluster
from job_functions import Signalled, events

from slurm import batch
from slurm.cluster import Cluster as Profile

FOUR_RANKS = {"nodes": 2, "ntasks_per_node": 2}


def executor(folder: Path, **parameters: Any) -> submitit.SlurmExecutor:
    """A submitit executor with the launcher's settings; ``parameters`` go before them."""
    built = submitit.SlurmExecutor(folder / "submitit", python=sys.executable)
    profile = Profile()
    settings: dict[str, Any] = {
        "time": 10,
        "nodes": 1,
        "ntasks_per_node": 1,
        "mem": "200M",
        "signal_delay_s": 30,
        "setup": [*batch.setup(profile, folder), f"export PYTHONPATH={Path(__file__).parent}"],
        "teardown": batch.teardown(profile.max_restarts),
        "srun_args": batch.srun_arguments(profile, folder),
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes"},
    }
    built.update_parameters(**{**settings, **parameters})
    return built


def start(cluster: Cluster, function: Signalled, **parameters: Any) -> submitit.Job[int]:
    """Submits the function and waits until every one of its ranks has started."""
    job = executor(function.folder, **parameters).submit(function)
    wait_started(cluster, function.folder, job.num_tasks)
    return job


def wait_started(cluster: Cluster, folder: Path, count: int) -> None:
    """Waits until so many ranks have started in all."""
    cluster.wait(lambda: len(events(folder, "start")) >= count, f"{count} started ranks")
