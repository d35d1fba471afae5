"""What submitit does when the disk of its folder is full."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import submitit
from harness import Cluster
from job_functions import text
from submission import executor, log

pytestmark = [pytest.mark.slurm, pytest.mark.facts]


@pytest.fixture
def disk(cluster: Cluster, folder: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    with cluster.small_disk(folder / "disk", 4) as small:
        yield small


def _fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    assert shutil.disk_usage(disk).free == 0
    return filler


def test_submission_fails_and_leaves_no_job(cluster: Cluster, disk: Path) -> None:
    chosen = executor(disk)
    _fill(disk)
    with pytest.raises(OSError, match="No space left"):
        chosen.submit(text, 1)
    assert cluster.run("squeue", "--noheader") == ""


def test_result_is_lost_and_blocks_the_next(cluster: Cluster, disk: Path) -> None:
    job = executor(disk).submit(text, 6_000_000)
    assert cluster.wait_ended(job.job_id) == "FAILED"
    assert "Job completed successfully" in log(job)
    with pytest.raises(submitit.core.utils.UncompletedJobError, match="not produced any output"):
        job.result()
    # What could be written stays, and another start ends at it even where there is space again.
    (left,) = (disk / "submitit").glob("*.save_tmp")
    assert left.name == f"{job.job_id}_0_result.pkl.save_tmp"
    left.write_bytes(b"")
    cluster.requeue(job.job_id)
    cluster.wait(lambda: cluster.fields(job.job_id)["Restarts"] == "1", "requeued job")
    assert cluster.wait_ended(job.job_id) == "FAILED"
    assert "A temporary saved file already exists" in log(job)


@pytest.mark.core
def test_job_that_starts_on_a_full_disk(cluster: Cluster, disk: Path) -> None:
    job = executor(disk, additional_parameters={"begin": "now+2"}).submit(text, 1)
    filler = _fill(disk)
    assert cluster.wait_ended(job.job_id) == "FAILED"
    # It could not say why: not even its log has a word.
    assert log(job) == ""
    filler.unlink()
    (disk / "submitit" / f"{job.job_id}_0_result.pkl.save_tmp").unlink()
    cluster.requeue(job.job_id)
    cluster.wait(lambda: cluster.fields(job.job_id)["Restarts"] == "1", "requeued job")
    assert cluster.wait_ended(job.job_id) == "COMPLETED"
    assert job.result() == "x"
