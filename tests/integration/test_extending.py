"""The examples of README and docs/extending.md run as they are in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from g2rpo.training.loop import Trainer

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
    files = FILE.findall((ROOT / "README.md").read_text()) + FILE.findall(page)
    assert len(files) == 8
    for name, text in files:
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(text)
    (line,) = REGISTRY_LINE.findall(page)
    registry = tmp_path / "g2rpo" / "rewards" / "registry.py"
    opening = "REWARDS: dict[str, str] = {\n"
    source = registry.read_text()
    assert source.count(opening) == 1
    registry.write_text(source.replace(opening, opening + line))

    _, table, policy, training, _ = COMMAND.findall(page)
    assert "First step only" in follow(*table, tmp_path)
    written = tmp_path / "results" / "runs" / "my-profile" / "my_table" / "my_table.md"
    assert "Colourfulness" in written.read_text()

    runs = tmp_path / "results" / "runs"
    before = set(runs.glob("first_step-*"))
    follow(*policy, tmp_path)
    follow(*training, tmp_path)
    (new,) = set(runs.glob("first_step-*")) - before
    assert json.loads((new / "config.json").read_text())["policy"]["source"] == "my-policy"


def test_an_iteration_by_hand_is_the_trainers(
    page: str, smoke_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "runs" / "assets").mkdir(parents=True)
    (tmp_path / "results" / "runs" / "assets" / "smoke").symlink_to(smoke_assets)
    code = dict(FILE.findall(page))["by_hand.py"]
    found: dict[str, Any] = {}
    exec(compile(code, "by_hand.py", "exec"), found)
    assert float((found["found"].ratio - 1).abs().max()) < 2e-5
    rollout = found["rollout"]
    states = rollout.states.shape[:2]
    assert states == (len(found["prompts"]), len(rollout.tree.states))
    for step in rollout.recorded:  # what was recorded is among the states that were kept
        kept = [i for i in rollout.tree.recorded if rollout.tree.states[i].node == step.step + 1]
        assert torch.equal(rollout.states[:, kept], step.next_latents)

    trainer = Trainer(found["config"], tmp_path / "run")
    trainer.iterate()
    expected = trainer.policy.transformer.state_dict()
    for name, value in found["policy"].transformer.state_dict().items():
        assert torch.equal(value, expected[name])
