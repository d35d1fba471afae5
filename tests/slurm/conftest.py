"""The cluster that tests run on, clean for each of them, and a limit on every test's time."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from harness import Cluster, ClusterNotPossibleError
from launcher import Workplace

TEST_SECONDS = 3600


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    with cluster.lock():
        was_up = cluster.is_up()
        try:
            cluster.up()
            # submitit calls SLURM's commands with the environment of this process.
            os.environ.update(cluster.environment)
            yield cluster
        except ClusterNotPossibleError as reason:
            pytest.skip(str(reason))
        finally:
            for name in cluster.environment:
                os.environ.pop(name, None)
            if not was_up:
                cluster.down()


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster without jobs and with two idle nodes, left so by the test before."""
    _cluster.restore()
    yield _cluster
    _cluster.restore()


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    """Ends a test that hangs where nobody thought of a deadline, as in ``result()`` of submitit."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the test ran for {TEST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TEST_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test's jobs leave what they did; jobs find the tests' own modules."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return tmp_path


@pytest.fixture(scope="session")
def embedded(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of encoding the prompts: what every experiment would begin with."""
    place = Workplace(tmp_path_factory.mktemp("embedded"), Cluster(), smoke_assets)
    place.g2rpo("embed", "rows.yaml", "--profile", "tiny.yaml")
    return place.runs


@pytest.fixture
def places(
    cluster: Cluster, smoke_assets: Path, embedded: Path, tmp_path: Path
) -> Callable[..., Workplace]:
    """Makes a workplace for some cells, whose prompts are encoded already."""

    def make(*cells: str) -> Workplace:
        place = Workplace(tmp_path / "work", cluster, smoke_assets, cells)
        shutil.copytree(embedded / "embeddings", place.runs / "embeddings")
        return place

    return make
