"""Submitting, watching, cancelling and retrying from the command line."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import small_profile_data, told_here
from forked import Command

from g2rpo.attempts import read_attempts
from reproduce.jobs.launch import DRIVER, latest_submission
from reproduce.jobs.status import is_over, read_status
from reproduce.runs.state import latest_attempt

TABLE: dict[str, Any] = {
    "name": "one_row",
    "cells": {"base": {}, "hps/mix_grpo": {"method": "mix_grpo", "train": ["hps"]}},
    "table": {"title": "One row", "baseline": "base", "columns": ["hps"]},
}
ARGUMENTS = ("one_row.yaml", "--profile", "small.yaml", "--jobs", "1", "--cluster", "local")
SLOW = ("-s", "optimization.iterations=2000")


@pytest.fixture(scope="module")
def inputs(smoke_assets: Path) -> dict[str, str]:
    """An experiment and a profile on the session's tiny models."""
    profile = small_profile_data(smoke_assets)
    profile["rewards"] = {name: profile["rewards"][name] for name in ("hps", "clip")}
    return {"one_row.yaml": yaml.safe_dump(TABLE), "small.yaml": yaml.safe_dump(profile)}


def workplace(folder: Path, inputs: dict[str, str]) -> Path:
    for name, text in inputs.items():
        (folder / name).write_text(text)
    return folder


def until(condition: Callable[[], bool], what: str, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.5)


def words_of(folder: Path) -> dict[str, str]:
    """The word of each stage of the latest submission, by kind and label."""
    if not list((folder / "results/runs/submissions").glob("*/submission.json")):
        return {}
    statuses = read_status(latest_submission(folder / "results/runs"))
    return {f"{s.stage.kind} {s.stage.label}": s.word for s in statuses}


def driver_is_over(folder: Path) -> bool:
    attempt = latest_attempt(latest_submission(folder / "results/runs").folder / DRIVER)
    return attempt is not None and attempt.state != "running"


TRAIN = "train hps/mix_grpo, seed 1"


def test_results_that_cannot_be_written_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, error = told_here(capsys, tmp_path, "reproduce", "table1", "--results", "file/inside")
    assert code == 2 and error.startswith("error: file/inside: cannot be written (")
    assert error.endswith("; choose another --results\n")


def test_submitted_watched_cancelled_and_retried(
    tmp_path: Path, inputs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workplace(tmp_path, inputs)

    def g2rpo(*words: str) -> tuple[int, str, str]:
        return told_here(capsys, folder, *words)

    code, _, error = g2rpo("reproduce", "--detach", *ARGUMENTS, *SLOW)
    assert code == 0 and "running in the background" in error
    until(lambda: words_of(folder).get(TRAIN) == "running", "training")

    code, shown, _ = g2rpo("status")
    assert code == 0
    rows = {line.split()[0]: line for line in shown.splitlines() if line.startswith(("tr", "re"))}
    assert "running" in rows["train"] and "waiting" in rows["render"]
    assert re.search(r"\d+ done, 1 running", shown)

    code, _, error = g2rpo("logs", "score mix")
    assert code == 2 and "has no log yet: it is waiting" in error
    submission = latest_submission(folder / "results/runs").name
    code, _, error = g2rpo("logs", "trian")
    assert code == 2 and f"{submission} has no stage 'trian'; " in error and "--of" in error

    code, shown, _ = g2rpo("cancel")
    assert code == 0 and "stopping; finished work is kept" in shown
    until(lambda: driver_is_over(folder), "end of the driver")
    found = words_of(folder)
    assert found[TRAIN] == "interrupted"
    assert is_over(read_status(latest_submission(folder / "results/runs")))
    assert g2rpo("cancel")[1].rstrip().endswith("not running")
    code, _, error = g2rpo("retry", "--failed")
    assert code == 2 and "no stage failed" in error

    # It resumes with its original settings; stopped again, since it would take hours.
    again = Command(folder, "retry")
    try:
        until(lambda: words_of(folder).get(TRAIN) == "running", "training again")
        code, _, error = g2rpo("logs", "train", "-n", "5")
        assert code == 0 and "train hps/mix_grpo, seed 1: results/runs/submissions/" in error
        name = latest_submission(folder / "results/runs").name
        assert g2rpo("cancel", name)[0] == 0
        code, _, error = again.wait()
    finally:
        again.kill()
    assert code == 130
    assert "interrupted; run the same command to resume" in error
    training = next((folder / "results/runs").glob("mix_grpo-*/leases"))
    attempts = read_attempts(training, "train")
    assert [attempt.state for attempt in attempts] == ["stopped", "stopped"]


def test_two_at_once_do_nothing_twice_and_end_alike(tmp_path: Path, inputs: dict[str, str]) -> None:
    folder = workplace(tmp_path, inputs)
    both = [Command(folder, "reproduce", *ARGUMENTS) for _ in range(2)]
    try:
        (code, first, error), (other_code, second, other_error) = [one.wait() for one in both]
    finally:
        for one in both:
            one.kill()
    assert (code, other_code) == (0, 0), error + other_error
    assert "MixGRPO" in first
    assert first == second
    leases = {path.parent for path in (folder / "results/runs").glob("**/leases/*/*.json")}
    stages = [lease for lease in leases if lease.name.startswith(("train", "sample", "score"))]
    assert len(stages) == 5
    for lease in stages:
        attempts = read_attempts(lease.parent, lease.name)
        # The process that waited for the other found the stage done, without working itself.
        worked = [a for a in attempts if a.record and a.record.progress.description]
        assert len(worked) <= 1, lease
        assert {attempt.state for attempt in attempts} == {"done"}
    words = words_of(folder)
    assert all(word == "done" for name, word in words.items() if "render" not in name)


REFUSALS = {
    "unknown cluster": (["reproduce", "one_row.yaml", "--cluster", "lokal"], "local"),
    "no submission": (["status"], "no submissions"),
    "no SLURM": (["reproduce", "one_row.yaml", "--cluster", "slurm"], "--profile mini"),
    "no SLURM to submit to": (
        ["reproduce", "one_row.yaml", "--detach", "--cluster", "a100-modules"], "sbatch",
    ),
    "no script": (["plan", "one_row.yaml", "--dry-run", "--cluster", "local"], "--dry-run"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_mistake_gets_one_line_and_exit_code_2(
    tmp_path: Path,
    inputs: dict[str, str],
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = workplace(tmp_path, inputs)
    monkeypatch.setenv("PATH", str(tmp_path))
    words, expected = REFUSALS[case]
    if words[0] in ("reproduce", "plan"):
        words = [*words, "--profile", "small.yaml"]
    code, out, error = told_here(capsys, folder, *words)
    assert code == 2 and out == ""
    assert error.startswith("error: ") and expected in error
    assert error.count("\n") == 1


def test_scripts_are_printed_on_a_machine_without_slurm(
    tmp_path: Path,
    inputs: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = workplace(tmp_path, inputs)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ("plan", "one_row.yaml", "--profile", "small.yaml", "--dry-run", "--cluster", "slurm")
    code, shown, _ = told_here(capsys, folder, *words)
    assert code == 0
    assert shown.count("#!/bin/bash") == 7
    assert "#SBATCH --dependency='afterok:<embed/" in shown
    assert "#SBATCH --dependency='afterany:<score/" in shown
    assert not (folder / "results").exists()


SBATCH = """
number=$(($(wc -l <"$QUEUE") + 100))
comment=$(sed -n "s/^#SBATCH --comment=//p" "${@: -1}" | tr -d "'")
echo "$number|PENDING|Priority||$comment" >>"$QUEUE"
echo "Submitted batch job $number"
"""
SCANCEL = """
for job; do sed -i "s/^$job|PENDING/$job|CANCELLED/" "$QUEUE"; done
"""


def test_on_slurm_every_command_tells_the_truth(
    tmp_path: Path,
    inputs: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, commands, queue = workplace(tmp_path, inputs), tmp_path / "bin", tmp_path / "queue"
    commands.mkdir()
    queue.touch()
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    monkeypatch.setenv("QUEUE", str(queue))

    def command(name: str, body: str) -> None:
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)

    def g2rpo(*words: str) -> tuple[int, str, str]:
        return told_here(capsys, folder, *words)

    def last(*words: str) -> str:
        code, shown, error = g2rpo(*words)
        assert code == 0, error
        return shown.splitlines()[-1]

    for name, body in (("sbatch", SBATCH), ("scancel", SCANCEL), ("squeue", 'cat "$QUEUE"'),
                       ("sacct", "echo accounting is disabled >&2; exit 1")):  # fmt: skip
        command(name, body)
    submit = ("reproduce", *ARGUMENTS[:3], "--cluster", "slurm", "--detach")
    assert "submitted one_row-" in g2rpo(*submit)[2]
    assert last("status") == "7 waiting"
    (first,) = (folder / "results/runs/submissions").glob("one_row-*")

    # SLURM itself knows which stages its jobs run.
    (first / "jobs.jsonl").unlink()
    assert last("status") == "7 waiting"
    assert "already queued or running" in g2rpo(*submit)[2]
    assert queue.read_text().count("PENDING") == 7

    # What waits for a cancelled training is submitted again with it; the rest keeps its jobs.
    (line,) = (line for line in queue.read_text().splitlines() if "/train/" in line)
    queue.write_text(queue.read_text().replace(line, line.replace("PENDING", "CANCELLED")))
    assert "1 cancelled" in last("status")
    assert "submitted one_row-" in g2rpo(*submit)[2]
    assert last("status") == "7 waiting"
    assert queue.read_text().count("PENDING") == 8  # both have their table's
    code, shown, _ = g2rpo("cancel")
    assert code == 0 and ": 4 jobs cancelled" in shown
    assert f"4 jobs of {first.name}; cancel them with `g2rpo cancel {first.name}`" in shown

    # SLURM is away.
    command(
        "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    code, shown, _ = g2rpo("status")
    assert code == 0 and shown.startswith("SLURM not reachable (squeue failed: slurm_load_jobs")
    assert "7 unknown" in shown.splitlines()[-1]
    for words in (("cancel",), ("logs", "train"), submit, ("retry", "--failed")):
        code, _, error = g2rpo(*words)
        assert code == 2 and "Unable to contact slurm controller" in error, words
        assert error.splitlines()[-1].startswith("error: ") and "Traceback" not in error
    assert queue.read_text().count("PENDING") == 4

    # The jobs of a damaged record can be cancelled all the same.
    command("squeue", 'cat "$QUEUE"')
    (first / "submission.json").write_text("[]")
    assert g2rpo("cancel", first.name)[0] == 0
    assert queue.read_text().count("PENDING") == 0
