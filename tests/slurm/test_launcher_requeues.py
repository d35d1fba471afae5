"""A training that is interrupted repeatedly ends with identical weights."""

from collections.abc import Callable

import pytest
from harness import Cluster, preempted, usr2_by_hand
from launcher import Workplace, interrupt

pytestmark = pytest.mark.slurm
TRAIN = "train hps/g2rpo"
ITERATIONS = 30


def test_time_limit_starts_a_training_again(
    cluster: Cluster, places: Callable[..., Workplace]
) -> None:
    place = places("hps/g2rpo")
    place.profile(ranks=1, iterations=100_000, every=1000)
    place.submit()
    job = place.job(TRAIN)
    place.wait_iteration(TRAIN, 1)
    # Looked at every 30 s, and a signal that would be due before the next look is given at once.
    cluster.set_time_limit(job, 1)
    cluster.wait(lambda: cluster.fields(job)["Restarts"] != "0", "restart")
    # A minute may be over again before a busy machine has started the next attempt.
    cluster.set_time_limit(job, 20)
    first = place.attempts(TRAIN)[0]
    assert first.state == "stopped" and first.record is not None
    saved = first.record.progress.done or 0
    assert saved > 0

    # It saved when it was asked to, long before the next checkpoint was due.
    def resumed() -> bool:
        records = [attempt.record for attempt in place.attempts(TRAIN)[1:]]
        return any(record and (record.progress.done or 0) > saved for record in records)

    cluster.wait(resumed, "iteration after the restart")
    for name in place.alive():
        cluster.scancel(name)


def test_training_requeued_three_times_gives_the_same_weights(
    cluster: Cluster, places: Callable[..., Workplace], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = places("hps/g2rpo")
    place.profile(ranks=2, iterations=ITERATIONS, every=5)
    place.cluster_profile(tasks_per_node=1)  # two nodes
    place.submit()
    job = place.job(TRAIN)
    causes = (usr2_by_hand, Cluster.requeue, preempted)
    for number, cause in enumerate(causes, start=1):
        place.wait_iteration(TRAIN, number)
        cause(cluster, job)
        cluster.wait(
            lambda number=number: cluster.fields(job)["Restarts"] == str(number),  # type: ignore[misc]
            f"restart {number}",
        )
    place.wait_attempt(TRAIN, len(causes) + 1, "done")
    assert cluster.wait_ended(job) == "COMPLETED"
    interrupted = place.weights()
    for name in place.alive():
        cluster.scancel(name)
    states = [attempt.state for attempt in place.attempts(TRAIN)]
    # A requeue from outside leaves no time to save: it resumes from the last checkpoint.
    assert states[0] == states[2] == "stopped", states

    again = Workplace(tmp_path_factory.mktemp("local"), cluster, place.assets, ("hps/g2rpo",))
    again.profile(ranks=2, iterations=ITERATIONS, every=5)
    local = again.start(*again.request("reproduce", "--jobs", "2", place="local"))
    try:
        cluster.wait(again.trained, "undisturbed training on this machine")
    finally:
        interrupt(local)
    assert again.weights() == interrupted
