"""What torch.distributed is given: address and port of rank 0."""

import random
from pathlib import Path

import pytest
from harness import Cluster
from job_functions import distributed_environment
from submission import FOUR_RANKS, executor

pytestmark = [pytest.mark.slurm, pytest.mark.core]


def _port(job: str) -> int:
    return random.Random(job).randint(20000, 60000)


def test_address_and_port_of_four_ranks(cluster: Cluster, folder: Path) -> None:
    job = executor(folder, gpus_per_node=2, **FOUR_RANKS).submit(distributed_environment)
    assert cluster.wait_ended(job.job_id) == "COMPLETED"
    found = job.results()
    assert [each["rank"] for each in found] == [0, 1, 2, 3]
    assert [each["local_rank"] for each in found] == [0, 1, 0, 1]
    # The port hangs on the job's id alone: the same at every start, and nobody looks if it is free.
    rest = {(each["address"], each["resolved"], each["port"], each["world"]) for each in found}
    assert rest == {("node1", "127.0.0.1", _port(job.job_id), 4)}
    # A rank sees both GPUs of its node until it chooses.
    assert {each["gpus"] for each in found} == {"0,1"}


def test_tasks_of_an_array_have_ports_of_their_own(cluster: Cluster, folder: Path) -> None:
    several = executor(folder)
    with several.batch():
        jobs = [several.submit(distributed_environment) for _ in range(3)]
    for job in jobs:
        assert cluster.wait_ended(job.job_id) == "COMPLETED"
    assert [job.result()["port"] for job in jobs] == [_port(job.job_id) for job in jobs]
