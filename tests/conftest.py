"""What all tests share: no network, one thread, and the tiny models of the smoke profile."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

# The same examples everywhere, however long a busy machine takes for one.
settings.register_profile("g2rpo", deadline=None, derandomize=True)
settings.load_profile("g2rpo")


def pytest_collection_finish() -> None:
    """Spares all later garbage collections the libraries' objects, which stay."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tiny models run fastest on one thread, and sums have one order.
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small_hpsv3_images() -> Iterator[None]:
    """HPSv3 sees a few tokens of an image, where the published size has 256."""
    from g2rpo.rewards import hpsv3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hpsv3, "PIXELS", 6 * 28 * 28)
        yield


@pytest.fixture(autouse=True)
def _no_stop_request() -> Iterator[None]:
    from g2rpo.stop import StopRequest

    StopRequest.clear()
    yield
    StopRequest.clear()


@pytest.fixture(scope="session")
def smoke_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny random models and prompts that the smoke profile runs on."""
    from benchmarks.mini_world.tiny_models import build_tiny_models

    folder = tmp_path_factory.mktemp("assets") / "smoke"
    build_tiny_models(folder)
    return folder


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random FluxPipeline folder; copy it before changing it."""
    from tiny_flux import build_tiny_flux

    return build_tiny_flux(tmp_path_factory.mktemp("flux") / "pipeline")
