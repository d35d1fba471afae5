"""The checks of `g2rpo check machine` on machines unlike this one."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from g2rpo import provenance
from reproduce.checks import flux_blocks, machine, whole_path
from reproduce.checks.machine import Devices, gibibytes
from reproduce.commands.check import conclude
from slurm.checks.finding import Finding

T4 = Devices(("T4, 15.0 GiB",), ((7, 5),), "580.95.05", True)
H100 = Devices(("H100, 79.2 GiB",) * 8, ((9, 0),) * 8, "580.95.05", True)
BROKEN = Devices(driver="470.57.02", visible=True, error="The NVIDIA driver is too old")
DOCKER = 64 * 2**20


@pytest.mark.parametrize(
    ("devices", "required", "word", "text"),
    [
        (H100, True, "ok", "8 x H100, 79.2 GiB; driver 580.95.05"),
        (T4, True, "warning", "compute capability"),
        (Devices(), True, "failed", "none"),
        (Devices(), False, "note", "none"),
        (Devices(driver="580.95.05"), True, "failed", "--gpus all"),
        (Devices(driver="580.95.05"), False, "note", "driver 580.95.05 is loaded"),
        (BROKEN, False, "failed", "driver 470.57.02 (The NVIDIA driver is too old)"),
    ],
)
def test_gpus(devices: Devices, required: bool, word: str, text: str) -> None:
    found = machine.check_devices(devices, required=required)
    assert found.word == word and text in f"{found.found}; {found.fix}"


def test_packages_are_compared_with_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "uv.lock"
    source = 'source = { registry = "https://pypi.org/simple" }'
    packages = [
        f'name = "torch"\nversion = "2.14.1"\n{source}',
        f'name = "jinja2"\nversion = "3.1.6"\n{source}',
        f'name = "sphinx"\nversion = "9.0.4"\n{source}',
        f'name = "sphinx"\nversion = "9.2.0"\n{source}',
        'name = "g2rpo"\nversion = "0.1.0"\nsource = { editable = "." }',
    ]
    lock.write_text("".join(f"[[package]]\n{package}\n" for package in packages))
    locked = machine.locked_versions(lock)
    assert locked == {"torch": "2.14.1", "jinja2": "3.1.6"}
    assert machine.check_packages(locked, locked).word == "ok"
    found = machine.check_packages(locked, locked | {"jinja2": "3.0"})
    assert found.word == "warning"
    assert "jinja2 3.0 (locked: 3.1.6)" in found.found
    assert machine.check_packages({}, locked).word == "note"
    assert machine.locked_versions(tmp_path / "absent") == {}


def test_memory() -> None:
    assert machine.check_shared_memory(DOCKER, 0).word == "note"
    found = machine.check_shared_memory(DOCKER, 8)
    assert found.word == "warning" and "--shm-size" in found.fix
    assert machine.check_shared_memory(2**33, 8).word == "ok"
    assert machine.check_memory(2, 2 * 2**30).word == "warning"
    assert machine.check_memory(2, 24 * 2**30).word == "ok"


def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    assert machine.check_results(tmp_path / "not" / "there" / "yet").word != "failed"
    assert not (tmp_path / "not").exists()
    # Even root cannot create files in /proc.
    found = machine.check_results(Path("/proc/results"))
    assert found.word == "failed"
    assert f"uid {os.getuid()}" in found.found and "--user" in found.fix
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("open_to_others", [".", "runs/submissions"])
def test_folders_of_jobs_that_others_can_write_to_are_a_warning(
    tmp_path: Path, open_to_others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "LITTLE", 0)
    (tmp_path / "runs" / "submissions").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "runs", tmp_path / "runs" / "submissions"):
        path.chmod(0o755)
    assert "others" not in machine.check_results(tmp_path).found
    (tmp_path / open_to_others).chmod(0o775)
    found = machine.check_results(tmp_path)
    assert found.word == "warning" and found.fix == f"chmod go-w {tmp_path / open_to_others}"


def test_missing_weights_are_a_note_and_a_cache_of_others_a_warning(tmp_path: Path) -> None:
    assert machine.check_cache(tmp_path, 0, 0).word == "ok"
    assert machine.check_cache(tmp_path, 2, 4_000_000).word == "note"
    assert "HF_HOME" in machine.check_cache(tmp_path, 1, 10**18).fix
    assert machine.check_cache(Path("/proc/cache"), 2, 4_000_000).word == "warning"


def test_the_last_line_is_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    findings = [Finding("ok", "a", "b"), Finding("warning", "[c]", long, "fix it", 1.25, 2**31)]
    conclude(findings)
    out = capsys.readouterr().out
    assert long in out and "1.2" in out and "2.0 GiB" in out
    assert out.endswith("verdict: ready; warnings: [c]\n")
    with pytest.raises(typer.Exit) as caught:
        conclude([*findings, Finding("failed", "d", "e", "f")], "cluster here: ")
    assert caught.value.exit_code == 2
    verdict = "verdict: cluster here: failed: d; warnings: [c]\n"
    assert capsys.readouterr().out.endswith(verdict)
    assert gibibytes(64 * 2**20) == "64 MiB"


def test_flux_blocks_run_in_both_precisions_with_like_gradients() -> None:
    shape: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": 32,
        "pooled_projection_dim": 16, "axes_dims_rope": (4, 14, 14), "side": 4, "tokens": 8,
    }  # fmt: skip
    cpu = torch.device("cpu")
    exact = flux_blocks.run_blocks(cpu, torch.float32, **shape)
    rounded = flux_blocks.run_blocks(cpu, **shape)
    assert exact > 0.01
    assert rounded == pytest.approx(exact, rel=0.05)


def test_one_bad_gpu_is_named() -> None:
    fine = {"gpu": 0, "seconds": 0.5, "memory": 7 * 2**30}
    found = flux_blocks.summarize([fine], "", 12.0)
    assert (found.word, found.memory, found.seconds) == ("ok", 7 * 2**30, 12.0)
    bad = {"gpu": 1, "error": "CUDA error: an illegal memory access was encountered"}
    found = flux_blocks.summarize([fine, bad], "", 12.0)
    assert found.word == "failed"
    assert "GPU 1: CUDA error" in found.found
    assert flux_blocks.summarize([], "", 0.1).word == "failed"


@pytest.mark.parametrize(
    ("score", "problem"), [("", "cannot read"), ("nan", "non-finite"), ("0.3", "")]
)
def test_a_table_must_have_finite_scores(tmp_path: Path, score: str, problem: str) -> None:
    assert "cannot read its table" in whole_path._problem_of_table(tmp_path)
    text = f"row,hps,clip\nbase,0.1,0.2\nhps/g2rpo,0.1,{score}\n"
    (tmp_path / "check.csv").write_text(text)
    found = whole_path._problem_of_table(tmp_path)
    assert problem in found and bool(found) == bool(problem)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo working >&2; echo 'error: no such thing' >&2; exit 2", "exit code 2: no such thing"),
        ("exit 1", "exit code 1: no message"),
        ("kill -KILL $$", "killed by SIGKILL (out of memory?)"),
        ("exit 0", "cannot read its table"),
    ],
)
def test_a_failed_run_is_one_line(
    script: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/bash\n{script}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(whole_path.sys, "executable", str(interpreter))
    found = whole_path.check_whole_path()
    assert found.word == "failed"
    assert found.found.startswith(expected) and "\n" not in found.found


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("0123abc", ("0123abc", False)),
        ("0123abc-dirty", ("0123abc", True)),
        ("", (None, None)),
        (None, (None, None)),
    ],
)
def test_without_a_repository_the_image_says_the_commit(
    variable: str | None,
    expected: tuple[str | None, bool | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(provenance.COMMIT_VARIABLE, variable)
    assert provenance.git_state.__wrapped__() == expected


def test_a_repository_goes_before_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "0123abc")
    monkeypatch.setattr(
        provenance, "_git", lambda *arguments: "4567def" if "HEAD" in arguments else ""
    )
    assert provenance.git_state.__wrapped__() == ("4567def", False)
