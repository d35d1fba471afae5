"""The command line as a user runs it, on a profile of the session's tiny models."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from reproduce.experiment import HERE


def g2rpo(
    folder: Path, *arguments: str, timeout: float = 600
) -> "subprocess.CompletedProcess[str]":
    """Runs ``g2rpo`` in ``folder``."""
    return subprocess.run(
        [sys.executable, "-m", "reproduce.cli", *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def small_profile_data(assets: Path) -> dict[str, Any]:
    """The smoke profile's settings, on ``assets`` that are there already."""
    text = (HERE / "profiles" / "smoke.yaml").read_text()
    profile: dict[str, Any] = yaml.safe_load(text.replace("results/runs/assets/smoke", str(assets)))
    for key in ("build", "assets"):
        profile.pop(key)
    return profile


def write_small_profile(path: Path, assets: Path, **changes: Any) -> Path:
    """Writes :func:`small_profile_data`, some of its settings changed."""
    path.write_text(yaml.safe_dump(small_profile_data(assets) | changes))
    return path
