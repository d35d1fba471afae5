"""`g2rpo runs`: the state, progress, ETA and last reward of every run, from its files alone."""

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from run_folders import (
    DAMAGE,
    SETTINGS,
    damage,
    write,
    write_attempt,
    write_evaluation,
    write_run,
)
from typer.testing import CliRunner

from g2rpo.config import merge
from g2rpo.errors import UserError
from reproduce.cli import app
from reproduce.runs.listing import read_run_state, read_run_states
from reproduce.settings import distinctions, flat


def test_a_finished_run_shows_its_last_rewards_and_evaluations(tmp_path: Path) -> None:
    state = read_run_state(write_run(tmp_path, "g2rpo-hps-seed1-aa", means={"hps": 0.7}))
    assert (state.word, state.done, state.total) == ("done", 4, 4)
    assert state.rewards == pytest.approx({"hps": 0.44})
    assert state.validation == pytest.approx({"hps": 0.541})
    assert (state.remaining, state.evaluations) == (None, "1 scored")
    # One that ended at a cost has as many iterations as it made.
    state = read_run_state(write_run(tmp_path, "a", optimization={"iterations": 60}))
    assert (state.word, state.done, state.total) == ("done", 4, 4)


def test_a_running_run_says_how_far_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", iterations=2, finished=False)
    write_attempt(folder / "leases" / "train", "running", done=2, total=4, remaining_seconds=90.0)
    state = read_run_state(folder)
    assert (state.word, state.done, state.total, state.remaining) == ("running", 2, 4, 90.0)
    assert state.node == "node07"


@pytest.mark.parametrize(
    ("state", "alive", "reason", "word", "told"),
    [
        ("running", False, "", "interrupted", "it was stopped"),
        ("stopped", False, "time limit", "interrupted", "time limit"),
        ("failed", False, "out of memory", "failed", "out of memory"),
        ("failed", False, "", "failed", "no error recorded"),
    ],
)
def test_a_run_that_does_not_go_on_says_why(
    tmp_path: Path, state: str, alive: bool, reason: str, word: str, told: str
) -> None:
    folder = write_run(tmp_path, "a", iterations=2, finished=False)
    write_attempt(folder / "leases" / "train", state, alive=alive, reason=reason)
    found = read_run_state(folder)
    assert found.word == word and found.reason.startswith(told)
    assert found.remaining is None


def test_a_run_without_a_row_and_one_with_damaged_settings_are_listed(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", finished=False)
    (folder / "metrics.jsonl").unlink()
    assert (read_run_state(folder).done, read_run_state(folder).rewards) == (0, {})
    (folder / "config.json").write_text("{")
    assert (read_run_state(folder).word, read_run_state(folder).total) == ("interrupted", None)


@pytest.mark.parametrize(("file", "content"), DAMAGE)
def test_a_damaged_file_is_told_and_the_other_runs_are_listed(
    tmp_path: Path, file: str, content: bytes
) -> None:
    broken = write_run(tmp_path / "runs", "g2rpo-hps-seed1-aa", means={"hps": 0.7})
    write_run(tmp_path / "runs", "g2rpo-hps-seed2-bb", means={"hps": 0.7})
    before = read_run_state(broken)
    damage(broken, file, content)
    state = read_run_state(broken)
    assert state.word == "interrupted"
    assert state.reason.startswith(f"damaged: {file}") and "\n" not in state.reason
    shown = CliRunner().invoke(app, ["runs", "--results", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    rows = {line.split()[0]: line for line in shown.stdout.splitlines()}
    assert f"damaged: {file}" in rows[broken.name] and "4/4" in rows["g2rpo-hps-seed2-bb"]
    assert " done " in rows["g2rpo-hps-seed2-bb"] and "damaged" not in rows["g2rpo-hps-seed2-bb"]
    if not file.startswith("metrics"):
        assert (state.done, state.rewards) == (before.done, before.rewards)


def test_a_run_that_goes_on_or_failed_is_that_with_a_damaged_file_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", finished=False)
    damage(folder, "metrics.jsonl", b"3\n4\n")
    write_attempt(folder / "leases" / "train", "running", done=2, total=4)
    assert read_run_state(folder).word == "running"
    assert read_run_state(folder).reason.startswith("damaged: metrics.jsonl, line 1")
    write_attempt(folder / "leases" / "train", "failed", reason="out of memory")
    assert read_run_state(folder).word == "failed"
    assert read_run_state(folder).reason.startswith("out of memory; damaged: metrics.jsonl, line 1")


def test_a_base_with_a_damaged_evaluation_is_not_done(tmp_path: Path) -> None:
    base = tmp_path / "base-0123"
    write_evaluation(base, {"hps": 0.7})
    write(base / "evaluations" / "other-ffffffffffff" / "manifest.json", [])
    state = read_run_state(base)
    assert (state.word, state.evaluations) == ("interrupted", "1 scored, unfinished")
    assert state.reason.startswith("damaged: evaluations/other-ffffffffffff/manifest.json")


def test_an_evaluation_that_runs_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", means={"hps": 0.7})
    lease = folder / "evaluations" / "test-ffffffffffff" / "leases" / "sample-1of1"
    write_attempt(lease, "running", description="sample", done=5, total=20)
    assert read_run_state(folder).evaluations == "1 scored, sample 5/20"
    base = tmp_path / "base-0123"
    write_evaluation(base, {"hps": 0.7})
    assert (read_run_state(base).word, read_run_state(base).done) == ("done", None)


def test_the_last_to_change_comes_first_and_other_folders_are_left_out(tmp_path: Path) -> None:
    for age, name in ((300, "old"), (10, "new"), (100, "middle")):
        folder = write_run(tmp_path, name)
        for path in folder.iterdir():
            os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "submissions" / "x").mkdir(parents=True)
    assert [state.name for state in read_run_states(tmp_path)] == ["new", "middle", "old"]


def test_flat_has_dotted_keys() -> None:
    nested = {"a": {"b": [1, 2], "c": {"d": "é"}}, "e": None, "f": {}}
    assert flat(nested) == {"a.b": "[1, 2]", "a.c.d": "é", "e": "null", "f": "{}"}
    assert flat({}) == {}


def config(**changes: Any) -> dict[str, Any]:
    return merge(SETTINGS, changes)


def test_runs_of_one_method_are_told_apart_by_what_few_of_them_have() -> None:
    told = distinctions(
        {
            "usual": config(),
            "another seed": config(seed=2, execution={"compile": True}),
            "eta": config(method={"eta": 0.3}),
            "both": config(method={"eta": 1.1}, optimization={"iterations": 8}),
            "other method": config(method={"name": "mix_grpo"}),
            "damaged": {},
        }
    )
    assert told == {
        "usual": "eta 0.7", "another seed": "eta 0.7", "eta": "eta 0.3",
        "both": "eta 1.1, iterations 8", "other method": "", "damaged": "",
    }  # fmt: skip


def test_a_setting_that_some_runs_lack_and_two_that_end_alike_are_told_in_full() -> None:
    told = distinctions(
        {
            "a": config(optimization={"epsilon": 1e-8}, advantage={"epsilon": 1e-4}),
            "b": config(optimization={"epsilon": 1e-6}, advantage={"epsilon": 1e-8}),
            "c": config(optimization={"epsilon": 1e-8}),
        }
    )
    assert told == {
        "a": "advantage.epsilon 0.0001",
        "b": "optimization.epsilon 1e-06, advantage.epsilon 1e-08",
        "c": "advantage.epsilon none",
    }


def test_components_are_named_after_their_section_and_long_lists_are_cut() -> None:
    rule = {"name": "nft", "beta": 1.0, "slope": 0.001}
    told = distinctions(
        {
            "gradient": config(objective={"name": "clip"}),
            "forward": config(objective=rule, optimization={"iterations": 8}, method={"eta": 1.1}),
            "usual": config(objective={"name": "clip"}),
        }
    )
    assert told["gradient"] == told["usual"] == ""
    assert sorted(told["forward"].removesuffix(" and 1 more").split(", ")) in [
        sorted(four)
        for four in combinations(
            ("objective nft", "beta 1.0", "slope 0.001", "iterations 8", "eta 1.1"), 4
        )
    ]


def test_the_command_lists_filters_and_refuses(tmp_path: Path) -> None:
    for name in ("g2rpo-hps-seed1-aa", "g2rpo-hps-seed2-bb", "mix_grpo-hps-seed1-cc"):
        write_run(tmp_path / "runs", name)
    where = ["--results", str(tmp_path)]
    shown = CliRunner().invoke(app, ["runs", "g2rpo-", "seed1", *where])
    assert shown.exit_code == 0
    assert "g2rpo-hps-seed1-aa" in shown.stdout and "done" in shown.stdout
    assert "4/4" in shown.stdout and "hps 0.4400" in shown.stdout
    assert "learning_rate" not in shown.stdout
    write_run(tmp_path / "runs", "g2rpo-hps-seed1-dd", optimization={"learning_rate": 1e-3})
    shown = CliRunner().invoke(app, ["runs", "g2rpo-", "seed1", *where])
    (row,) = (line for line in shown.stdout.splitlines() if line.startswith("g2rpo-hps-seed1-dd"))
    assert "learning_rate 0.001" in row and "learning_rate 5e-05" not in shown.stdout
    assert "seed2" not in shown.stdout and "mix_grpo" not in shown.stdout
    for arguments, told in (
        (["--state", "runing"], "valid: done, running,"),
        (["nothing"], "none of the 4 runs has 'nothing' in its name"),
        (["mixgrpo"], "did you mean 'mix_grpo'?"),
        (["seed2", "mix"], "none of the 4 runs matches 'seed2' and 'mix'"),
        (["--state", "failed"], "none of the 4 runs matches state failed"),
    ):
        refused = CliRunner().invoke(app, ["runs", *arguments, *where])
        assert isinstance(refused.exception, UserError) and told in str(refused.exception)
    nothing = CliRunner().invoke(app, ["runs", "--results", str(tmp_path / "absent")])
    assert isinstance(nothing.exception, UserError) and "no runs yet" in str(nothing.exception)


def test_commands_that_compute_nothing_import_no_model_library(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "g2rpo-hps-seed1-aa")
    code = f"""
import sys
from reproduce.cli import app
def imported(*names):
    print("imported:", sorted(set(names) & set(sys.modules)))
app(["runs", "--results", {str(tmp_path)!r}], standalone_mode=False)
imported("torch", "pandas")
app("plan table1 --profile mini --results {tmp_path}".split(), standalone_mode=False)
import reproduce.jobs.display, reproduce.jobs.runner
imported("diffusers", "peft", "scipy.stats", "transformers")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    assert "g2rpo-hps-seed1-aa" in done.stdout and "train" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("imported: ")]
    assert lines == ["imported: []"] * 2
