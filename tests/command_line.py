"""The command line as a user runs it, on a profile of the session's tiny models."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from reproduce.experiment import HERE


def g2rpo(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs ``g2rpo`` in ``folder``."""
    return subprocess.run(
        [sys.executable, "-m", "reproduce.cli", *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write_small_profile(path: Path, assets: Path) -> Path:
    """The smoke profile, on ``assets`` that are there already."""
    profile = yaml.safe_load((HERE / "profiles" / "smoke.yaml").read_text())
    for key in ("build", "assets"):
        profile.pop(key)
    path.write_text(yaml.safe_dump(profile).replace("results/runs/assets/smoke", str(assets)))
    return path
