"""The README's examples, followed to the letter in a copy of the project."""

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
LINK = re.compile(r"\]\((?!https?://)([^)#]+)")


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_links_lead_somewhere(readme: str) -> None:
    links = LINK.findall(readme)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_target_it_names_exists(readme: str) -> None:
    named = set(re.findall(r"`make ([a-z0-9-]+)", readme)) | set(
        re.findall(r"^make ([a-z0-9-]+)", readme, re.MULTILINE)
    )
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"mini", "test"} <= named
    assert named - targets == set()


def test_adding_a_method_a_reward_and_a_table(readme: str, tmp_path: Path) -> None:
    for package in ("g2rpo", "reproduce", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "assets")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    shutil.copytree(ROOT / "results" / "paper", tmp_path / "results" / "paper")
    files = FILE.findall(readme)
    assert len(files) == 5
    for name, text in files:
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(text)
    (line,) = REGISTRY_LINE.findall(readme)
    registry = tmp_path / "g2rpo" / "rewards" / "registry.py"
    opening = "REWARDS: dict[str, str] = {\n"
    source = registry.read_text()
    assert source.count(opening) == 1
    registry.write_text(source.replace(opening, opening + line))

    (command,) = re.findall(r"^g2rpo (reproduce my_table\.yaml .*)$", readme, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "reproduce.cli", *command.split(), "--jobs", "1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "First step only" in done.stdout
    table = tmp_path / "results" / "runs" / "my-profile" / "my_table" / "my_table.md"
    assert "Colourfulness" in table.read_text()
