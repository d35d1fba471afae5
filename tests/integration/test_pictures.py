"""Images kept during training: what they show, when, and that they change nothing."""

import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import g2rpo_here, write_small_profile
from PIL import Image
from training_runs import config_for, train_one_iteration, trainer_for, weights
from two_ranks import on_two_ranks

from benchmarks.evaluation.held_out import EvaluationConfig, image_path, sample_images
from g2rpo.data.prompts import read_prompts
from g2rpo.policy import load_policy
from g2rpo.policy.config import ImageConfig
from g2rpo.training.checkpoint.folder import checkpoint_folder
from g2rpo.training.metrics import read_metrics
from g2rpo.training.previews import pictured_iterations, pictures_folder, save_previews

GRID = {"steps": 3, "timestep": "exact"}


def pictures_of(assets: Path, every: int = 1) -> dict[str, object]:
    return {
        "file": str(assets / "prompts" / "test.txt"), "limit": 3, "every": every, "seed": 5,
        "grid": GRID, "height": 48, "width": 40, "guidance_scale": 2.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def pictured(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pictured")
    config = config_for(
        smoke_assets,
        pictures=pictures_of(smoke_assets),
        checkpoints={"every": 1, "keep_last": 3},
    )
    trainer, started = trainer_for(config, run), time.monotonic()
    trainer.train()
    (run / "took").write_text(str(time.monotonic() - started))
    return run


def test_images_are_those_that_an_evaluation_of_the_checkpoint_gives(
    pictured: Path, smoke_assets: Path, tmp_path: Path
) -> None:
    assert pictured_iterations(pictured) == [1, 2]
    size = {"height": 48, "width": 40, "guidance_scale": 2.0}
    protocol = EvaluationConfig(name="test", seed=5, grid=GRID, **size)  # type: ignore[arg-type]
    policy = config_for(smoke_assets).policy.at(protocol)
    prompts = read_prompts(smoke_assets / "prompts" / "test.txt", 3)
    shown = []
    for iteration in (1, 2):
        loaded = load_policy(policy, "cpu")
        loaded.load_transformer(checkpoint_folder(pictured, iteration) / "transformer")
        again = tmp_path / str(iteration)
        sample_images(loaded, prompts, protocol, again)
        folder = pictures_folder(pictured, iteration)
        assert {path.name for path in folder.iterdir()} == {f"{p.id}.png" for p in prompts}
        for prompt in prompts:
            ours, theirs = (np.array(Image.open(image_path(f, prompt))) for f in (folder, again))
            assert ours.shape == (48, 40, 3)
            assert (ours == theirs).all()
            shown.append(ours)
    assert any((one != other).any() for one, other in zip(shown[:3], shown[3:], strict=True))


def test_they_change_nothing_of_the_training(
    pictured: Path, smoke_assets: Path, tmp_path: Path
) -> None:
    config = config_for(smoke_assets, checkpoints={"every": 1, "keep_last": 3})
    trainer_for(config, tmp_path).train()
    ours, plain = weights(pictured), weights(tmp_path)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert not (tmp_path / "images").exists()


def test_no_global_random_state_is_touched(smoke_assets: Path, tmp_path: Path) -> None:
    config = config_for(smoke_assets, pictures=pictures_of(smoke_assets))
    trainer = trainer_for(config, tmp_path)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)  # noqa: NPY002
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    save_previews(config, tmp_path, trainer.weights, 1)
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    assert pictured_iterations(tmp_path) == [1]
    assert before[0] == after[0]
    assert all(np.array_equal(one, other) for one, other in zip(before[1], after[1], strict=True))
    assert torch.equal(before[2], after[2])


def test_a_run_that_was_stopped_has_each_once(
    pictured: Path, smoke_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(smoke_assets, pictures=pictures_of(smoke_assets))
    sampled = []
    train_one_iteration(config, tmp_path)
    assert pictured_iterations(tmp_path) == []
    from g2rpo.training import previews as pictures

    sample = pictures._sampled
    monkeypatch.setattr(pictures, "_sampled", lambda *given: sampled.append(1) or sample(*given))
    trainer_for(config, tmp_path).train()
    assert len(sampled) == 2
    for iteration in (1, 2):
        for path in pictures_folder(pictured, iteration).iterdir():
            same = pictures_folder(tmp_path, iteration) / path.name
            assert same.read_bytes() == path.read_bytes()
    # What is there is not sampled again.
    trainer = trainer_for(config, tmp_path)
    trainer.progress.iteration = 2
    pictures.save_previews(config, tmp_path, trainer.weights, 2)
    assert len(sampled) == 2


def test_the_seconds_of_the_phases_are_those_of_the_iterations(pictured: Path) -> None:
    rows = [row for row in read_metrics(pictured / "metrics.jsonl") if row["iteration"]]
    assert rows
    whole, before = 0.0, 0.0
    for row in rows:
        phases = [row[f"seconds/{name}"] for name in ("sampling", "scoring", "training")]
        assert all(seconds > 0 for seconds in phases)
        # Processor time, which is no more than the phases' wall time.
        assert 0.9 * (row["device_seconds"] - before) < sum(phases)
        whole, before = whole + sum(phases), row["device_seconds"]
    assert whole < float((pictured / "took").read_text())


def rank_of(folder: Path, *command: str) -> None:
    sys.exit(g2rpo_here(folder, *command))


def test_two_ranks_share_them(smoke_assets: Path, tmp_path: Path) -> None:
    path = write_small_profile(tmp_path / "small.yaml", smoke_assets, preview_prompts=3)
    command = (
        "train", "table1", "hps/dance_grpo", "--profile", str(path),
        "--results", str(tmp_path / "results"), "-s", "execution.device=cpu",
        "-s", "execution.sharding=fsdp2",
    )  # fmt: skip
    assert on_two_ranks(rank_of, tmp_path, *command) == 0
    (run,) = (tmp_path / "results" / "runs").glob("dance_grpo-*")
    names = {path.name for path in pictures_folder(run, 1).iterdir()}
    assert names == {f"{p.id}.png" for p in read_prompts(smoke_assets / "prompts/test.txt", 3)}


def test_the_policy_elsewhere_shares_its_weights(smoke_assets: Path) -> None:
    policy = load_policy(config_for(smoke_assets).policy, "cpu")
    other = policy.at(ImageConfig(height=48, width=40, guidance_scale=1.5))
    assert other.transformer is policy.transformer
    assert (other.config.size, other.config.guidance_scale) == ((48, 40), 1.5)
    assert policy.config.size == (32, 32)
    assert other.image_tokens > policy.image_tokens
    assert torch.equal(
        other.encode(["a red square"]).prompt_embeds, policy.encode(["a red square"]).prompt_embeds
    )
