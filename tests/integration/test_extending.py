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
ENTRY = re.compile(r"<!-- architecture entry -->\n```python\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^(?:g2rpo|python) .*$", re.MULTILINE)
FOLLOW = """
import runpy, sys
from reproduce.cli import app
for line in sys.argv[1:]:
    program, *arguments = line.split()
    if program == "g2rpo":
        app(arguments, standalone_mode=False)
    else:
        runpy.run_path(arguments[0], run_name="__main__")
"""
"""Runs command lines one after the other; in one process, since imports take longest."""


COMPARE = """
import torch
from diffusers import AuraFlowPipeline
from g2rpo.policy import PolicyConfig, load_policy

config = PolicyConfig(
    source="my-policy", height=32, width=48, guidance_scale=3.0, max_sequence_length=20
)
policy = load_policy(config, "cpu")
prompts, steps = ["a red circle on black", "two large blue stars"], 4
noise = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
pipeline = AuraFlowPipeline.from_pretrained("my-policy")
pipeline.set_progress_bar_config(disable=True)
sigmas = torch.linspace(1, 1 / steps, steps).tolist()
theirs = pipeline(
    prompts, height=32, width=48, num_inference_steps=steps, sigmas=sigmas, guidance_scale=3.0,
    latents=noise.clone(), max_sequence_length=20, output_type="latent",
)[0]
texts, ours = policy.encode(prompts), policy.pack(noise)
grid = pipeline.scheduler.sigmas.tolist()
with torch.no_grad():
    for sigma, following in zip(grid, grid[1:]):
        velocity = policy.velocity(ours, torch.full((2,), sigma), texts)
        ours = ours + (following - sigma) * velocity
torch.testing.assert_close(policy.unpack(ours), theirs, atol=1e-4, rtol=1e-4)
assert (theirs - noise).std() > 0.05
size = policy.model_size
assert size.parameters + size.buffers == sum(p.numel() for p in policy.transformer.parameters())
assert size.rows(config)["image"] == policy.image_tokens
"""
"""The example policy samples what its pipeline samples, and has the size it says."""


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "extending.md").read_text()


def use_assets(folder: Path, assets: Path) -> None:
    (folder / "results" / "runs" / "assets").mkdir(parents=True)
    (folder / "results" / "runs" / "assets" / "smoke").symlink_to(assets)


def test_adding_a_method_a_reward_a_table_and_a_policy(
    page: str, smoke_assets: Path, tmp_path: Path
) -> None:
    for package in ("g2rpo", "reproduce", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "assets")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    shutil.copytree(ROOT / "results" / "paper", tmp_path / "results" / "paper")
    use_assets(tmp_path, smoke_assets)
    files = FILE.findall((ROOT / "README.md").read_text()) + FILE.findall(page)
    assert len(files) == 10
    for name, text in files:
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(text)
    for pattern, place, opening in (
        (REGISTRY_LINE, "rewards/registry.py", "REWARDS: dict[str, str] = {\n"),
        (ENTRY, "policy/architectures.py", "ARCHITECTURES = {\n"),
    ):
        (lines,) = pattern.findall(page)
        module = tmp_path / "g2rpo" / place
        source = module.read_text()
        assert source.count(opening) == 1
        module.write_text(source.replace(opening, opening + lines))
    (tmp_path / "compare.py").write_text(COMPARE)

    _, table, policy, training, _ = COMMAND.findall(page)
    once = "-s optimization.iterations=1"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            FOLLOW,
            f"{table} --jobs 1 {once}",
            policy,
            f"{training} {once}",
            "python compare.py",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "First step only" in done.stdout
    runs = tmp_path / "results" / "runs"
    assert "Colourfulness" in (runs / "my-profile" / "my_table" / "my_table.md").read_text()
    settings = [json.loads(p.read_text()) for p in runs.glob("first_step-*/config.json")]
    assert sorted(one["policy"]["source"] for one in settings) == [
        "my-policy", "results/runs/assets/smoke/policy",
    ]  # fmt: skip


def test_an_iteration_by_hand_is_the_trainers(
    page: str, smoke_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    use_assets(tmp_path, smoke_assets)
    code = dict(FILE.findall(page))["by_hand.py"]
    names: dict[str, Any] = {}
    exec(compile(code, "by_hand.py", "exec"), names)
    assert float((names["found"].ratio - 1).abs().max()) < 2e-5
    rollout = names["rollout"]
    states = rollout.states.shape[:2]
    assert states == (len(names["prompts"]), len(rollout.tree.states))
    for step in rollout.recorded:  # recorded transitions are among the kept states
        kept = [i for i in rollout.tree.recorded if rollout.tree.states[i].node == step.step + 1]
        assert torch.equal(rollout.states[:, kept], step.next_latents)

    trainer = Trainer(names["config"], tmp_path / "run")
    trainer.iterate()
    expected = trainer.policy.transformer.state_dict()
    for name, value in names["policy"].transformer.state_dict().items():
        assert torch.equal(value, expected[name])
