"""``g2rpo serve-reward``, and a table whose rewards are asked of it, through the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import yaml
from command_line import small_profile_data, succeeded, told_here, write_small_profile

from g2rpo.rewards import http

KEY = "sk-very-secret"
TABLE = {
    "name": "served",
    "cells": {
        "base": {},
        "mine/g2rpo": {
            "method": "g2rpo", "train": ["mine"],
            "set": {
                "method": {"granularities": [1], "stochastic_steps": [0]},
                "optimization": {"iterations": 1},
            },
        },
    },
    "table": {"title": "A reward over HTTP", "columns": ["hps", "mine"]},
}  # fmt: skip


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[str]:
    """The address of ``g2rpo serve-reward`` in a process of its own."""
    command = [sys.executable, "-m", "reproduce.cli", "serve-reward", *arguments, "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("serving "), said
        yield said.split(" at ")[1].strip()
        process.terminate()


def test_a_table_with_a_reward_over_http(
    smoke_assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("REWARD_KEY", KEY)
    http._asked.cache_clear()
    (tmp_path / "served.yaml").write_text(yaml.safe_dump(TABLE))
    write_small_profile(tmp_path / "own.yaml", smoke_assets)
    keyed = ("--api-key-env", "REWARD_KEY")
    with serving(tmp_path, "hps", "--profile", "own.yaml", *keyed) as url:
        known = small_profile_data(smoke_assets)["rewards"]
        server = {"url": url, "api_key_env": "REWARD_KEY", "retries": 0}
        rewards = {
            "hps": known["hps"],
            "clip": known["clip"],
            "mine": {"model": "http", "label": "Mine", "server": server},
        }
        write_small_profile(tmp_path / "small.yaml", smoke_assets, rewards=rewards)
        run = ("served.yaml", "--profile", "small.yaml", "--jobs", "1")
        printed = succeeded(told_here(capsys, tmp_path, "reproduce", *run))
    results = tmp_path / "results" / "runs"
    table = pd.read_csv(results / "smoke" / "served" / "served.csv")
    assert "Mine" in printed and table["mine"].notna().all()
    (trained,) = results.glob("g2rpo-mine-*")
    for path in results.glob("*/evaluations/*/scores.parquet"):
        scores = pd.read_parquet(path)
        hps, mine = (scores[scores["reward"] == name] for name in ("hps", "mine"))
        assert len(mine) == len(hps) == 8
        assert mine["score"].tolist() == hps["score"].tolist()
        assert set(mine["weights_hash"]) == set(hps["weights_hash"])
        assert set(mine["version"]) == {f"hps-{version}" for version in hps["version"]}
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["provenance"]["weights"]["mine"] == hps["weights_hash"].iloc[0]
    asked = manifest["inputs"]["rewards"]["mine"]["reward"]["server"]
    assert asked["weights_hash"] == hps["weights_hash"].iloc[0]
    assert url not in json.dumps(manifest["inputs"])
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
    ]

    # Now nothing answers: finished tables are still shown, a plan is made, a run is refused.
    http._asked.cache_clear()
    table_of = ("served.yaml", "--profile", "small.yaml")
    printed = succeeded(told_here(capsys, tmp_path, "render", *table_of))
    assert "Mine" in printed
    printed = succeeded(told_here(capsys, tmp_path, "plan", *table_of))
    assert f"reward mine: {url}: no answer" in printed
    code, _, errors = told_here(
        capsys, tmp_path, "train", "served.yaml", "mine/g2rpo", *table_of[1:]
    )
    assert code == 2
    assert errors.splitlines()[-1].startswith(f"error: {url}: no answer after 1 attempts")


def test_mistakes_are_one_line(
    smoke_assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_small_profile(tmp_path / "own.yaml", smoke_assets)
    for arguments, message in (
        (["hsp"], "did you mean 'hps'"),
        (["hps", "--host", "256.0.0.1"], "--host 256.0.0.1 --port 8000"),
        (["hps", "--api-key-env", "NO_SUCH_KEY"], "--api-key-env: $NO_SUCH_KEY is not set"),
        (["hps", "-s", "batch=3"], "batch_size"),
    ):
        code, _, errors = told_here(
            capsys, tmp_path, "serve-reward", *arguments, "--profile", "own.yaml"
        )
        assert code == 2
        assert errors.splitlines()[-1].startswith("error: ") and message in errors
