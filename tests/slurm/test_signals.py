"""The signals that SLURM sends to a job, and how the batch script requeues it."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Cluster, preempted, usr2_by_hand
from job_functions import DieOfSignal, Signalled, events
from submission import FOUR_RANKS, executor, start, wait_started

from slurm import batch
from slurm.cluster import Cluster as Profile
from slurm.job import REQUEUE

pytestmark = pytest.mark.slurm

WITH_USR2 = "SlurmctldParameters=preempt_send_user_signal"
WITHOUT_USR2 = "SlurmctldParameters=idle_on_node_suspend"
"""SLURM's default at preemption: SIGTERM alone. (The option stands for none.)"""


def ranks(folder: Path, event: str, restarts: int = 0) -> list[int]:
    """The ranks that an event happened to in one start of the job."""
    found = [line["rank"] for line in events(folder, event) if line["restarts"] == restarts]
    return sorted(set(found))


def test_task_of_an_array_starts_again_alone(cluster: Cluster, folder: Path) -> None:
    several = executor(folder)
    with several.batch():
        jobs = [several.submit(Signalled(folder, value=value)) for value in range(3)]
    wait_started(cluster, folder, 3)
    array = jobs[0].job_id.split("_")[0]
    after = cluster.submit("true", f"--dependency=afterok:{array}")
    # The plain id of one task is the id of the whole array.
    plain = [cluster.fields(job.job_id)["JobId"] for job in jobs]
    one = jobs[plain.index(array)]
    cluster.scancel(one.job_id, "USR2")
    assert cluster.wait_ended(one.job_id) == "COMPLETED"
    others = [job.job_id for job in jobs if job is not one]
    assert [cluster.state(job) for job in others] == ["RUNNING", "RUNNING"]
    assert cluster.state(after) == "PENDING"
    for job in others:
        cluster.scancel(job, "USR2")
    assert cluster.wait_ended(after) == "COMPLETED"
    assert [cluster.fields(job.job_id)["Restarts"] for job in jobs] == ["1", "1", "1"]
    assert [job.result() for job in jobs] == [0, 1, 2]


@pytest.mark.core
@pytest.mark.parametrize("cause", [usr2_by_hand, preempted])
def test_every_rank_gets_usr2(
    cluster: Cluster, folder: Path, cause: Callable[[Cluster, str], None]
) -> None:
    job = start(cluster, Signalled(folder), **FOUR_RANKS)
    cause(cluster, job.job_id)
    cluster.wait(lambda: ranks(folder, "SIGUSR2") == [0, 1, 2, 3], "USR2 on four ranks")
    assert cluster.wait_ended(job.job_id) == "COMPLETED"
    assert ranks(folder, "SIGTERM") == []
    assert ranks(folder, "leave") == ranks(folder, "end", restarts=1) == [0, 1, 2, 3]
    # A preempted job, too, exits before SLURM kills it.
    cluster.wait_states(job.job_id, ["REQUEUED", "COMPLETED"])


def test_preemption_by_sigterm_alone(cluster: Cluster, folder: Path) -> None:
    with cluster.option(WITH_USR2, WITHOUT_USR2):
        job = start(cluster, Signalled(folder), **FOUR_RANKS)
        cluster.preempt()
        assert cluster.wait_ended(job.job_id) == "COMPLETED"
    assert ranks(folder, "SIGUSR2") == []
    assert ranks(folder, "SIGTERM") == [0, 1, 2, 3]
    assert cluster.fields(job.job_id)["Restarts"] == "1"


@pytest.mark.core
def test_cancelled_job_stays_cancelled(cluster: Cluster, folder: Path) -> None:
    job = start(cluster, Signalled(folder, closing=1), **FOUR_RANKS)
    cluster.scancel(job.job_id)
    assert cluster.wait_ended(job.job_id) == "CANCELLED"
    cluster.wait(lambda: not cluster.processes(job.job_id), "end of all processes")
    assert ranks(folder, "terminated") == [0, 1, 2, 3]
    time.sleep(8)  # a requeued job would have started again
    assert len(events(folder, "start")) == 4
    assert cluster.job_states(job.job_id) == ["CANCELLED by 0"]


def test_job_cancelled_while_it_closes(cluster: Cluster, folder: Path) -> None:
    # The batch script outlives scancel, and must see by the state that it must not requeue.
    several = executor(folder)
    several.parameters["setup"] = [*several.parameters["setup"], "trap : TERM"]
    job = several.submit(Signalled(folder, closing=2.5))
    wait_started(cluster, folder, 1)
    cluster.scancel(job.job_id, "USR2")
    cluster.wait(lambda: events(folder, "SIGUSR2"), "USR2")
    cluster.scancel(job.job_id)
    assert cluster.wait_ended(job.job_id) == "CANCELLED"
    time.sleep(8)
    assert cluster.state(job.job_id) == "CANCELLED"
    assert not (folder / f"{job.job_id}.requeue").exists()


@pytest.mark.core
def test_requeue_from_outside_gives_sigterm_and_no_usr2(cluster: Cluster, folder: Path) -> None:
    job = start(cluster, Signalled(folder, value=3), **FOUR_RANKS)
    cluster.requeue(job.job_id)
    assert cluster.wait_ended(job.job_id) == "COMPLETED"
    assert ranks(folder, "SIGUSR2") == []
    assert ranks(folder, "SIGTERM") == [0, 1, 2, 3]
    assert ranks(folder, "end", restarts=1) == [0, 1, 2, 3]
    assert job.results() == [3, 3, 3, 3]


def test_usr2_before_python_handles_it(cluster: Cluster, folder: Path) -> None:
    several = executor(folder)
    job = several.submit(DieOfSignal(folder))
    wait_started(cluster, folder, 1)
    cluster.scancel(job.job_id, "USR2")
    assert cluster.wait_ended(job.job_id) == "COMPLETED"
    assert cluster.fields(job.job_id)["Restarts"] == "1"


@pytest.mark.core
def test_requeue_while_the_controller_is_away(cluster: Cluster, folder: Path) -> None:
    settings = Profile()
    go, started, ended = (folder / name for name in ("go", "started", "ended"))
    first = [f"touch {started}", f"until [ -e {go} ]; do sleep 0.1; done"]
    first += ['touch "$marker"', f"touch {ended}"]
    script = [
        "#!/bin/bash",
        *batch.setup(settings, folder),
        'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then',
        *first,
        f"(exit {REQUEUE})",
        "fi",
        *batch.teardown(settings.max_restarts),
    ]
    path = folder / "job.sh"
    path.write_text("\n".join(script))
    job = cluster.run("sbatch", "--parsable", f"--output={folder}/log", str(path))
    after = cluster.submit("true", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    cluster.wait(started.exists, "started job")
    with cluster.controller_away():
        go.touch()
        cluster.wait(ended.exists, "end of the job's command")
        time.sleep(3)  # it has asked, and nobody has answered
    assert cluster.wait_ended(job) == "COMPLETED"
    assert cluster.fields(job)["Restarts"] == "1"
    assert cluster.wait_ended(after) == "COMPLETED"
