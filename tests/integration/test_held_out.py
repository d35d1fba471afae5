"""Held-out sampling and scoring: noise named by the prompt, nothing done twice, no silent gaps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from benchmarks.held_out import (
    EvaluationConfig,
    image_path,
    prune_images,
    read_images,
    sample_images,
    score_images,
)
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.errors import UserError
from g2rpo.flow.schedule import GridConfig
from g2rpo.policy import FluxPolicy, PolicyConfig


class CountingReward:
    """Mean brightness; counts the images it is asked about."""

    name, version, weights_hash = "counting", "1", "abc"

    def __init__(self) -> None:
        self.asked = 0

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        assert len(images) == len(prompts)
        self.asked += len(images)
        return images.float().mean((1, 2, 3))


@pytest.fixture(scope="module")
def policy(smoke_assets: Path) -> FluxPolicy:
    config = PolicyConfig(
        source=str(smoke_assets / "policy"), resolution=32, max_sequence_length=16
    )
    return FluxPolicy.load(config, "cpu")


@pytest.fixture(scope="module")
def prompts(smoke_assets: Path) -> list[Prompt]:
    return read_prompts(smoke_assets / "prompts" / "test.txt", 6)


PROTOCOL = EvaluationConfig(
    name="test", seed=5, grid=GridConfig(steps=3, timestep="exact"), resolution=32
)


def pixels(folder: Path, prompt: Prompt) -> np.ndarray:
    return np.asarray(Image.open(image_path(folder, prompt))).astype(int)


def test_images_do_not_depend_on_batch_order_or_company(
    policy: FluxPolicy, prompts: list[Prompt], tmp_path: Path
) -> None:
    sample_images(policy, prompts, PROTOCOL, tmp_path / "whole", batch=6)
    sample_images(policy, prompts[::-1], PROTOCOL, tmp_path / "pairs", batch=2)
    sample_images(policy, prompts[3:4], PROTOCOL, tmp_path / "alone", batch=1)
    for prompt in prompts:
        difference = np.abs(pixels(tmp_path / "whole", prompt) - pixels(tmp_path / "pairs", prompt))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.001
    alone = np.abs(pixels(tmp_path / "alone", prompts[3]) - pixels(tmp_path / "whole", prompts[3]))
    assert alone.max() <= 1
    other = PROTOCOL.model_copy(update={"seed": 6})
    sample_images(policy, prompts[:1], other, tmp_path / "other", batch=1)
    changed = pixels(tmp_path / "other", prompts[0]) - pixels(tmp_path / "whole", prompts[0])
    assert np.abs(changed).mean() > 5


def test_an_interrupted_sampling_makes_only_what_is_missing(
    policy: FluxPolicy, prompts: list[Prompt], tmp_path: Path
) -> None:
    assert sample_images(policy, prompts, PROTOCOL, tmp_path, batch=4) == 6
    kept = image_path(tmp_path, prompts[0])
    before = kept.stat().st_mtime_ns
    image_path(tmp_path, prompts[2]).unlink()
    assert sample_images(policy, prompts, PROTOCOL, tmp_path, batch=4) == 1
    assert kept.stat().st_mtime_ns == before


def test_scores_have_a_row_for_each_image_and_reward(
    policy: FluxPolicy, prompts: list[Prompt], tmp_path: Path
) -> None:
    sample_images(policy, prompts, PROTOCOL, tmp_path / "images")
    rewards = {"a": CountingReward(), "b": CountingReward()}
    scores = score_images(
        rewards, prompts, tmp_path / "images", tmp_path / "scores.parquet", batch=4
    )
    assert list(scores["reward"]) == ["a"] * 6 + ["b"] * 6
    assert scores["score"].dtype == np.float32
    for row in scores.itertuples():
        image = Image.open(tmp_path / "images" / str(row.image))
        assert row.score == pytest.approx(np.asarray(image).mean(), abs=1e-3)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "scores.parquet"), scores)


def test_an_interrupted_scoring_keeps_what_a_reward_has_done(
    policy: FluxPolicy, prompts: list[Prompt], tmp_path: Path
) -> None:
    sample_images(policy, prompts, PROTOCOL, tmp_path / "images")
    first, second = CountingReward(), CountingReward()

    class Broken(CountingReward):
        def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            raise UserError("out of order")

    output = tmp_path / "scores.parquet"
    with pytest.raises(UserError, match="out of order"):
        score_images({"a": first, "b": Broken()}, prompts, tmp_path / "images", output)
    assert not output.exists()
    again = CountingReward()
    score_images({"a": again, "b": second}, prompts, tmp_path / "images", output)
    assert (first.asked, again.asked, second.asked) == (6, 0, 6)
    assert sorted(path.name for path in tmp_path.glob("scores*")) == ["scores.parquet"]


def test_a_missing_or_broken_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"000007\.png: image missing"):
        read_images([tmp_path / "000007.png"])
    broken = tmp_path / "000008.png"
    Image.new("RGB", (8, 8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UserError, match=r"000008\.png"):
        read_images([broken])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png: its size differs"):
        read_images([tmp_path / "a.png", tmp_path / "b.png"])


def test_pruning_keeps_the_first_prompts(tmp_path: Path) -> None:
    prompts = [Prompt(f"{i:06d}", "x") for i in range(5)]
    for prompt in prompts:
        Image.new("RGB", (4, 4)).save(image_path(tmp_path, prompt))
    prune_images(tmp_path, prompts, None)
    assert len(list(tmp_path.iterdir())) == 5
    prune_images(tmp_path, prompts, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000.png", "000001.png"]
