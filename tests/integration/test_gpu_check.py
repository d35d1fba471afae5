"""``make check-gpu``: every check on tiny models, and what becomes of checks that fail."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check.checks import CHECKS, Check, CheckFailedError, Measured, Place
from benchmarks.speed.sizes import FULL_TRAINING_BYTES, FluxShape, deepest_flux
from g2rpo.errors import UserError
from g2rpo.policy.flux_size import FluxSize


def test_every_check_passes_on_tiny_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # which it changes
    gpu_check.main(device="cpu", minutes=8, output=tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == "verdict: passed"
    result = json.loads((tmp_path / "check.json").read_text())
    measured = {check["name"]: check["measured"] for check in result["checks"]}
    assert list(measured) == [check.name for check in CHECKS]
    assert all(measured.values())
    assert measured["resume"]["bit-identical, killed"]
    assert measured["speed"]["seconds, ours"] > 0
    page = (tmp_path / "check.md").read_text()
    assert all(f"| {check.name} | passed |" in page for check in CHECKS)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU is usable here"):
        gpu_check.main(device="cuda")
    with pytest.raises(UserError, match="--device tpu: no such device"):
        gpu_check.main(device="tpu")


def crashes(place: Place, found: Measured) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(place: Place, found: Measured) -> None:
    time.sleep(600)


def raises(place: Place, found: Measured) -> None:
    raise ValueError("two\nlines")


def disagrees(place: Place, found: Measured) -> None:
    found.update({"distance": 2.0, "cosine": math.nan})
    raise CheckFailedError("too far")


def passes(place: Place, found: Measured) -> None:
    found["device"] = place.device


def test_a_check_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = tuple(Check(f.__name__, f, 1) for f in (crashes, raises, disagrees, hangs, passes))
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    limits = {"hangs": 1.0}
    supervise = gpu_check.supervise
    monkeypatch.setattr(
        gpu_check, "supervise",
        lambda check, place, limit: supervise(check, place, limits.get(check.name, limit)),
    )  # fmt: skip
    outcomes = {each.name: each for each in gpu_check.run_all(Place("cpu", tmp_path), 600)}
    assert {name: each.problem for name, each in outcomes.items()} == {
        "crashes": "its process ended with SIGSEGV",
        "raises": "ValueError: two lines",
        "disagrees": "too far",
        "hangs": "not finished after 1 s",
        "passes": "",
    }
    assert outcomes["disagrees"].measured == {"distance": 2.0, "cosine": "nan"}
    assert outcomes["passes"].measured == {"device": "cpu"}


@pytest.mark.parametrize("memory", [24, 80, 141])
def test_the_depth_follows_the_memory(memory: int) -> None:
    def need(shape: FluxShape) -> int:
        size = FluxSize(
            num_layers=shape.double_blocks, num_single_layers=shape.single_blocks,
            guidance_embeds=True,
        )  # fmt: skip
        return FULL_TRAINING_BYTES * size.parameters

    shape = deepest_flux(memory * 2.0**30)
    one_more = FluxShape(shape.double_blocks + 1, shape.single_blocks + 2)
    assert need(shape) <= 0.75 * memory * 2**30 < need(one_more)
    assert deepest_flux(memory * 2.0**30, 1) == FluxShape(1, 2)
