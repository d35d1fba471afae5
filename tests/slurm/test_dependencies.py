"""Jobs that wait for others, and what a failed parent does to them."""

import pytest
from harness import Cluster

pytestmark = pytest.mark.slurm


@pytest.mark.core
def test_child_of_a_failed_job(cluster: Cluster) -> None:
    parent = cluster.submit("false")
    kill = "--kill-on-invalid-dep=yes"
    child = cluster.submit("true", f"--dependency=afterok:{parent}", kill)
    grandchild = cluster.submit("true", f"--dependency=afterok:{child}", kill)
    waiting = cluster.submit("true", f"--dependency=afterok:{parent}")
    any_end = cluster.submit("true", f"--dependency=afterany:{parent}")
    assert cluster.wait_ended(parent) == "FAILED"
    assert cluster.wait_ended(any_end) == "COMPLETED"
    for job in (child, grandchild):
        assert cluster.wait_ended(job) == "CANCELLED"
        # The controller knows why, as long as it remembers the job; accounting never does.
        assert cluster.fields(job)["Reason"] == "DependencyNeverSatisfied"
        (attempt,) = cluster.wait_attempts(job, ["CANCELLED"])
        assert attempt.nodes == "None assigned"
        assert "Never" not in attempt.reason
    # Without the option the child would wait for ever.
    fields = cluster.fields(waiting)
    assert (fields["JobState"], fields["Reason"]) == ("PENDING", "DependencyNeverSatisfied")
    # A dependency on a job that has failed already is no error of sbatch.
    late = cluster.submit("true", f"--dependency=afterok:{parent}", kill)
    assert cluster.wait_ended(late) == "CANCELLED"


def test_one_failed_task_fails_the_dependency_on_its_array(cluster: Cluster) -> None:
    array = cluster.submit("[ $SLURM_ARRAY_TASK_ID != 1 ]", "--array=0-2")
    child = cluster.submit("true", f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes")
    of_one = cluster.submit("true", f"--dependency=afterok:{array}_2")
    assert cluster.wait_ended(child) == "CANCELLED"
    assert cluster.wait_ended(of_one) == "COMPLETED"
