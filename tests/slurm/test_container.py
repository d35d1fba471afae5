"""SLURM jobs inside the project's own image: submitted, requeued from outside, completed.

Run by ``docker/check-image.sh``, which builds the image.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness import Cluster

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "G2RPO_CONTAINER_IMAGE"
STORAGE = "G2RPO_CONTAINER_STORAGE"

pytestmark = [
    pytest.mark.container,
    pytest.mark.skipif(IMAGE not in os.environ, reason="docker/check-image.sh gives the image"),
]

EXPERIMENT = {
    "name": "contained",
    "cells": {"base": {}, "hps/g2rpo": {"method": "g2rpo", "train": ["hps"]}},
    "table": {"title": "In a container", "baseline": "base", "columns": ["hps"]},
}


def _engine(folder: Path) -> dict[str, str]:
    """Variables that make podman find the image and run without systemd."""
    storage = Path(os.environ[STORAGE])
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{storage}/storage"\n'
        f'runroot = "{storage}/run"\n'
    )
    (folder / "containers.conf").write_text(
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\n'
        '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n'
    )
    return {
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "CONTAINERS_CONF": str(folder / "containers.conf"),
    }


def _profile(folder: Path, environment: dict[str, str]) -> None:
    cluster = {
        "partition": "main",
        "tasks_per_node": 1,
        "cpus_per_task": 1,
        "memory_gb_per_task": 3,
        "signal_lead_seconds": 30,
        "environment": {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        "container": {
            "kind": "podman",
            "image": os.environ[IMAGE],
            "mounts": [str(folder)],
            "arguments": ["--no-healthcheck"],
        },
    }
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))


def _inside(*command: str) -> str:
    """The output of a command in the image."""
    words = ["podman", "run", "--rm", "--no-healthcheck", "--entrypoint", "", os.environ[IMAGE]]
    done = subprocess.run(
        [*words, *command], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _g2rpo(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "reproduce.cli", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_jobs_run_in_the_image_and_survive_a_requeue(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = _engine(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _profile(tmp_path, environment)
    place = ["experiment.yaml", "--profile", "smoke", "--cluster", "cluster.yaml"]
    longer = ["--set", "optimization.iterations=300", "--set", "checkpoints.every=5"]
    done = _g2rpo(tmp_path, "reproduce", "--detach", *place, *longer)
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "results" / "runs"

    number = cluster.run("squeue", "--noheader", "--name=g2rpo-train", "--format=%i").split()[0]
    checkpoints = "g2rpo-*/checkpoints/iteration-*"
    cluster.wait(lambda: list(runs.glob(checkpoints)), "checkpoint of the training")
    cluster.requeue(number)
    cluster.wait(lambda: list(runs.glob("g2rpo-*/manifest.json")), "end of the training")
    table = runs / "smoke" / "contained" / "contained.md"
    cluster.wait(table.exists, "table")
    assert int(cluster.fields(number)["Restarts"]) >= 1
    assert len(list(runs.glob("g2rpo-*/leases/train/*.json"))) >= 2
    status = _g2rpo(tmp_path, "status")
    assert status.returncode == 0, status.stderr
    assert "failed" not in status.stdout
    scripts = [path.read_text() for path in (runs / "submissions").glob("*/jobs/*_submission.sh")]
    assert scripts and all("podman run" in script for script in scripts)
    (manifest,) = runs.glob("g2rpo-*/manifest.json")
    # Only the image uses Debian's interpreter.
    python = json.loads(manifest.read_text())["provenance"]["hardware"]["python"]
    inside = _inside("python3", "-c", "import platform; print(platform.python_version())")
    assert python == inside
