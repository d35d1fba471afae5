"""Jobs as the launcher submits them: what stands in the batch script around srun."""

import sys
from pathlib import Path
from typing import Any

import submitit
from harness import Cluster
from job_functions import Signalled, events

DIED_OF_USR2 = 128 + 12
"""What srun ends with when the signal came before Python could handle it."""

DIED_OF_TERM = 128 + 15


def requeueing(folder: Path) -> list[str]:
    """The lines after srun: they run outside of any container, where scontrol is to be had.

    A job starts again for one of three causes: it left a marker; the signal killed it, as it was
    still importing; or it ended because preemption gave it SIGTERM alone. Never when it is not
    RUNNING any more, for then somebody cancelled it.
    """
    return [
        "code=$?",
        # One task of an array has the number of the whole array, so the plain id will not do.
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        "again=",
        f'[ -e "{folder}/$job.requeue" ] && again=marker',
        f"[ $code = {DIED_OF_USR2} ] && again=usr2",
        'details=$(scontrol show job --oneliner "$job")',
        f'[ $code = {DIED_OF_TERM} ] && [[ "$details" = *PreemptTime=[0-9]* ]] && again=preempted',
        f'rm -f "{folder}/$job.requeue"',
        'state=$(squeue --noheader --jobs="$job" --format=%T)',
        f'echo "$job $code $state $again" >>"{folder}/teardown"',
        '[ -n "$again" ] && [ "$state" = RUNNING ] && scontrol requeue "$job"',
        "exit $code",
    ]


def teardowns(folder: Path) -> list[str]:
    """What every run of the lines after srun saw: job, code of srun, state, and the cause."""
    file = folder / "teardown"
    return [line.strip() for line in file.read_text().splitlines()] if file.exists() else []


def executor(folder: Path, **parameters: Any) -> submitit.SlurmExecutor:
    """A submitit executor with the launcher's settings; ``parameters`` go before them."""
    built = submitit.SlurmExecutor(folder / "submitit", python=sys.executable)
    settings: dict[str, Any] = {
        "time": 10,
        "nodes": 1,
        "ntasks_per_node": 1,
        "mem": "200M",
        "signal_delay_s": 30,
        "teardown": requeueing(folder),
        "srun_args": ["--kill-on-bad-exit=1"],
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes"},
    }
    built.update_parameters(**{**settings, **parameters})
    return built


FOUR_RANKS = {"nodes": 2, "ntasks_per_node": 2}


def start(cluster: Cluster, function: Signalled, **parameters: Any) -> submitit.Job[int]:
    """Submits the function and waits until every one of its ranks has started."""
    job = executor(function.folder, **parameters).submit(function)
    wait_started(cluster, function.folder, job.num_tasks)
    return job


def wait_started(cluster: Cluster, folder: Path, count: int) -> None:
    """Waits until so many ranks have started in all."""
    cluster.wait(lambda: len(events(folder, "start")) >= count, f"{count} started ranks")


def log(job: submitit.Job[Any]) -> str:
    """What rank 0, srun and the batch script wrote."""
    return str(job.paths.stdout.read_text())
