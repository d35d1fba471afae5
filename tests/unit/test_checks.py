"""What `g2rpo check machine` says of machines that this one is not."""

import os
from pathlib import Path

import pytest
import torch
import typer

from g2rpo import provenance
from reproduce.checks import flux_blocks, folders, machine, whole_path
from reproduce.checks.folders import gibibytes
from reproduce.checks.machine import Devices
from reproduce.commands.check import conclude
from slurm.checks.finding import Finding

H100 = Devices(("H100, 79.2 GiB",) * 8, ((9, 0),) * 8, "580.95.05", True)


def test_usable_gpus_are_counted_by_model() -> None:
    found = machine.check_devices(H100, required=True)
    assert found.word == "ok"
    assert found.found == "8 x H100, 79.2 GiB; driver 580.95.05"
    old = Devices(("T4, 15.0 GiB",), ((7, 5),), "580.95.05", True)
    assert machine.check_devices(old, required=True).word == "warning"


@pytest.mark.parametrize("required", [False, True])
def test_a_missing_gpu_is_a_note_unless_it_is_required(required: bool) -> None:
    found = machine.check_devices(Devices(), required=required)
    assert found.word == ("failed" if required else "note")
    not_passed_on = Devices(driver="580.95.05")
    found = machine.check_devices(not_passed_on, required=required)
    assert found.word == ("failed" if required else "note")
    assert "--gpus all" in found.fix and "580.95.05" in found.found


def test_a_driver_that_torch_cannot_use_is_a_failure_with_its_reason() -> None:
    broken = Devices(driver="470.57.02", visible=True, error="The NVIDIA driver is too old")
    found = machine.check_devices(broken, required=False)
    assert found.word == "failed"
    assert "470.57.02" in found.found and "too old" in found.found


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


def test_little_shared_memory_matters_with_several_gpus() -> None:
    docker = 64 * 2**20
    assert machine.check_shared_memory(docker, 0).word == "note"
    found = machine.check_shared_memory(docker, 8)
    assert found.word == "warning" and "--shm-size" in found.fix
    assert machine.check_shared_memory(2**33, 8).word == "ok"


def test_little_memory_is_a_warning() -> None:
    assert machine.check_memory(2, 2 * 2**30).word == "warning"
    assert machine.check_memory(2, 24 * 2**30).word == "ok"


def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    assert folders.check_results(tmp_path / "not" / "there" / "yet").word != "failed"
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("")
    # Even root cannot make files in /proc.
    found = folders.check_results(Path("/proc/results"))
    assert found.word == "failed"
    assert f"uid {os.getuid()}" in found.found and "--user" in found.fix
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("open_to_others", [".", "runs", "runs/submissions"])
def test_folders_of_jobs_that_others_can_write_to_are_a_warning(
    tmp_path: Path, open_to_others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "LITTLE", 0)
    (tmp_path / "runs" / "submissions").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "runs", tmp_path / "runs" / "submissions"):
        path.chmod(0o755)
    assert "others" not in folders.check_results(tmp_path).found
    (tmp_path / open_to_others).chmod(0o775)
    found = folders.check_results(tmp_path)
    assert found.word == "warning" and found.fix == f"chmod go-w {tmp_path / open_to_others}"


def test_missing_weights_are_a_note_and_a_cache_of_others_a_warning(tmp_path: Path) -> None:
    assert folders.check_cache(tmp_path, 0, 0).word == "ok"
    assert folders.check_cache(tmp_path, 2, 4_000_000).word == "note"
    assert "HF_HOME" in folders.check_cache(tmp_path, 1, 10**18).fix
    assert folders.check_cache(Path("/proc/cache"), 2, 4_000_000).word == "warning"


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
    shape = flux_blocks.Shape(
        heads=2, head_width=32, text_width=32, pooled_width=16, image_side=4, text_tokens=8
    )
    cpu = torch.device("cpu")
    exact = flux_blocks.run_blocks(cpu, shape, torch.float32)
    rounded = flux_blocks.run_blocks(cpu, shape)
    assert exact > 0.01
    assert rounded == pytest.approx(exact, rel=0.05)


def test_one_bad_gpu_is_named() -> None:
    fine = {"gpu": 0, "seconds": 0.5, "memory": 7 * 2**30}
    found = flux_blocks.judge([fine], "", 12.0)
    assert (found.word, found.memory, found.seconds) == ("ok", 7 * 2**30, 12.0)
    bad = {"gpu": 1, "error": "CUDA error: an illegal memory access was encountered"}
    found = flux_blocks.judge([fine, bad], "", 12.0)
    assert found.word == "failed"
    assert "GPU 1: CUDA error" in found.found
    assert flux_blocks.judge([], "", 0.1).word == "failed"
    assert "not finished" in flux_blocks.judge([], "not finished after 300 s", 300.0).found


def test_a_table_that_lacks_a_score_is_noticed(tmp_path: Path) -> None:
    table = tmp_path / "check.csv"
    assert "cannot be read" in str(whole_path._problem_of_table(tmp_path))
    table.write_text("row,hps,clip\nbase,0.1,0.2\nhps/g2rpo,0.1,\n")
    assert "cannot be read" in str(whole_path._problem_of_table(tmp_path))
    table.write_text("row,hps,clip\nbase,0.1,0.2\nhps/g2rpo,0.1,nan\n")
    assert "not finite" in str(whole_path._problem_of_table(tmp_path))
    table.write_text("row,hps,clip\nbase,0.1,0.2\nhps/g2rpo,0.1,0.3\n")
    assert whole_path._problem_of_table(tmp_path) is None


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo working >&2; echo 'error: no such thing' >&2; exit 2", "exit code 2: no such thing"),
        ("exit 1", "exit code 1: no message"),
        ("kill -KILL $$", "stopped by SIGKILL (out of memory?)"),
        ("exit 0", "its table cannot be read"),
    ],
)
def test_a_path_that_fails_is_told_in_one_line(
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
