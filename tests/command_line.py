"""Runs the command line, on a profile of the session's tiny models."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from reproduce import cli
from reproduce.experiment import HERE


def g2rpo(
    folder: Path, *arguments: str, timeout: float = 600
) -> "subprocess.CompletedProcess[str]":
    """Runs ``g2rpo`` in ``folder``, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "reproduce.cli", *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def g2rpo_here(folder: Path, *arguments: str) -> int:
    """Runs ``g2rpo`` in ``folder``, in this process: starting another takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["g2rpo", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
    return int(left.value.code or 0)


def told_here(
    capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object
) -> tuple[int, str, str]:
    """:func:`g2rpo_here`, with what it printed and its errors."""
    capsys.readouterr()
    code = g2rpo_here(folder, *map(str, arguments))
    return code, *capsys.readouterr()


def succeeded(told: tuple[int, str, str]) -> str:
    """What a command printed, which must have succeeded."""
    code, out, errors = told
    assert code == 0, errors
    return out


def refused(told: tuple[int, str, str]) -> str:
    """The errors of a command, in one line, which must have been refused."""
    code, _, errors = told
    assert code == 2, errors
    return " ".join(errors.split())


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
