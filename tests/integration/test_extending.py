"""The examples of docs/extending.md, followed to the letter in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
REGISTRY_LINE = re.compile(r"<!-- registry line -->\n```python\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^(g2rpo|python) (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "extending.md").read_text()


def follow(program: str, arguments: str, folder: Path) -> str:
    module = ["-m", "reproduce.cli"] if program == "g2rpo" else []
    jobs = ["--jobs", "1"] if arguments.startswith("reproduce") else []
    done = subprocess.run(
        [sys.executable, *module, *arguments.split(), *jobs],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_adding_a_method_a_reward_a_table_and_a_policy(page: str, tmp_path: Path) -> None:
    for package in ("g2rpo", "reproduce", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "assets")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    shutil.copytree(ROOT / "results" / "paper", tmp_path / "results" / "paper")
    files = FILE.findall(page)
    assert len(files) == 7
    for name, text in files:
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(text)
    (line,) = REGISTRY_LINE.findall(page)
    registry = tmp_path / "g2rpo" / "rewards" / "registry.py"
    opening = "REWARDS: dict[str, str] = {\n"
    source = registry.read_text()
    assert source.count(opening) == 1
    registry.write_text(source.replace(opening, opening + line))

    table, policy, training = COMMAND.findall(page)
    assert "First step only" in follow(*table, tmp_path)
    written = tmp_path / "results" / "runs" / "my-profile" / "my_table" / "my_table.md"
    assert "Colourfulness" in written.read_text()

    runs = tmp_path / "results" / "runs"
    before = set(runs.glob("first_step-*"))
    follow(*policy, tmp_path)
    follow(*training, tmp_path)
    (new,) = set(runs.glob("first_step-*")) - before
    assert json.loads((new / "config.json").read_text())["policy"]["source"] == "my-policy"
