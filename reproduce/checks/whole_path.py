"""Trains, samples and scores tiny random models, up to a table, through the command line."""

import csv
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from g2rpo.config import load_yaml
from g2rpo.provenance import REPOSITORY
from reproduce.experiment import HERE
from slurm.checks.finding import Finding

NAME = "train to table"
LIMIT = 600
"""Time limit in seconds; it takes about 20 on two cores."""
EXPERIMENT: dict[str, Any] = {
    "name": "check",
    "cells": {"base": {}, "hps/g2rpo": {"method": "g2rpo", "train": ["hps"]}},
    "table": {
        "title": "Check",
        "baseline": "base",
        "columns": ["hps", "clip"],
    },
}


def check_whole_path() -> Finding:
    """Runs the smoke profile on two cells in a temporary folder, in a separate process."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="g2rpo-check-") as name:
        folder = Path(name)
        profile = load_yaml(HERE / "profiles" / "smoke.yaml")
        text = json.dumps(profile).replace(str(profile["assets"]), str(folder / "assets"))
        (folder / "profile.yaml").write_text(text)  # JSON is YAML
        (folder / "check.yaml").write_text(json.dumps(EXPERIMENT))
        command = ["reproduce", "check.yaml", "--profile", "profile.yaml", "--jobs", "1"]
        _, problem = run_module(["reproduce.cli", *command], folder, LIMIT)
        problem = problem or _problem_of_table(folder / "results" / "runs" / "smoke" / "check")
    seconds = time.monotonic() - started
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    if problem:
        return Finding(
            "failed", NAME, problem,
            "run `g2rpo reproduce table1 --profile smoke` for the full output", seconds, memory,
        )  # fmt: skip
    text = "profile smoke trains, samples, scores and prints a table"
    return Finding("ok", NAME, text, "", seconds, memory)


def run_module(command: list[str], folder: Path, limit: int) -> tuple[str, str]:
    """Runs a module of this project, with its arguments, in ``folder`` for ``limit`` seconds.

    Returns:
        its output, and a one-line error, empty if there is none.
    """
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"not finished after {limit} s"
    problem = ""
    if done.returncode < 0:
        reason = signal.Signals(-done.returncode).name
        problem = f"killed by {reason}" + (" (out of memory?)" if reason == "SIGKILL" else "")
    elif done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        problem = f"exit code {done.returncode}: {lines[-1].removeprefix('error: ')}"
    return done.stdout, problem


def _problem_of_table(folder: Path) -> str:
    """The problem of the table in ``folder``, which must have two rows of finite scores."""
    try:
        with (folder / "check.csv").open(newline="") as file:
            rows = {row["row"]: row for row in csv.DictReader(file)}
        values = [
            float(rows[key][name]) for key in ("base", "hps/g2rpo") for name in ("hps", "clip")
        ]
    except (OSError, KeyError, ValueError) as error:
        return f"cannot read its table ({type(error).__name__}: {error})"
    return "" if all(map(math.isfinite, values)) else "its table contains non-finite scores"
