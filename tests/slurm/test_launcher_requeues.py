"""A training that is interrupted again and again ends as if it had not been."""

from collections.abc import Callable

import pytest
from harness import Cluster
from launcher import Workplace, interrupt

pytestmark = pytest.mark.slurm

TEST_SECONDS = 900
TRAIN = "train hps/g2rpo"
ITERATIONS = 30


def _by_hand(cluster: Cluster, job: str) -> None:
    cluster.scancel(job, "USR2")


def _from_outside(cluster: Cluster, job: str) -> None:
    cluster.requeue(job)


def _preempted(cluster: Cluster, job: str) -> None:
    cluster.preempt()


def _at_the_time_limit(cluster: Cluster, job: str) -> None:
    cluster.set_time_limit(job, 1)


def test_training_requeued_for_every_cause_gives_the_same_weights(
    cluster: Cluster, places: Callable[..., Workplace], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = places("hps/g2rpo")
    # Long enough that the last interruption, which may take a minute, comes before the end.
    place.profile(ranks=2, iterations=ITERATIONS, every=5)
    place.cluster_profile(tasks_per_node=1)  # two nodes
    place.submit()
    job = place.job(TRAIN)
    causes = (_by_hand, _from_outside, _preempted, _at_the_time_limit)
    for number, cause in enumerate(causes, start=1):
        place.wait_iteration(TRAIN, number)
        cause(cluster, job)
        cluster.wait(
            lambda number=number: cluster.fields(job)["Restarts"] == str(number),  # type: ignore[misc]
            120,
            f"restart {number}",
        )
    place.wait_attempt(TRAIN, len(causes) + 1, "done")
    assert cluster.wait_ended(job) == "COMPLETED"
    interrupted = place.weights()
    for name in place.alive():
        cluster.scancel(name)
    states = [attempt.state for attempt in place.attempts(TRAIN)]
    # From outside there is no time to save: the last checkpoint is gone on from.
    assert states[0] == states[2] == states[3] == "stopped", states

    again = Workplace(tmp_path_factory.mktemp("local"), cluster, place.assets, ("hps/g2rpo",))
    again.profile(ranks=2, iterations=ITERATIONS, every=5)
    local = again.start(*again.request("reproduce", "--jobs", "2", place="local"))
    try:
        cluster.wait(again.trained, 240, "undisturbed training on this machine")
    finally:
        interrupt(local)
    assert again.weights() == interrupted
