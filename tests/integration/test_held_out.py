"""Held-out sampling and scoring: noise named by the prompt, nothing done twice, no silent gaps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from cell_factory import make_cell
from PIL import Image

from benchmarks.evaluation.held_out import (
    EvaluationConfig,
    compared_images,
    image_path,
    prune_images,
    sample_images,
    score_images,
)
from benchmarks.evaluation.protocol import DiversityConfig
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.errors import UserError
from g2rpo.flow.schedule import GridConfig
from g2rpo.policy import Policy, PolicyConfig, load_policy
from g2rpo.progress import ProgressReport
from g2rpo.rewards.base import BatchedReward, RewardConfig
from g2rpo.stop import Stopped, StopRequest


class CountingReward(BatchedReward):
    """Mean brightness; counts the images it scores."""

    name = "counting"

    def __init__(self, weights: str = "abc") -> None:
        super().__init__("cpu", 4, "1", weights)
        self.asked = 0

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> "CountingReward":
        return cls()

    def evaluate(self, prepared: Any) -> torch.Tensor:
        images, prompts = prepared
        assert len(images) == len(prompts)
        self.asked += len(images)
        return torch.stack([image.float().mean() for image in images])


@pytest.fixture(scope="module")
def policy(smoke_assets: Path) -> Policy:
    config = PolicyConfig(
        source=str(smoke_assets / "policy"), resolution=32, max_sequence_length=16
    )
    return load_policy(config, "cpu")


@pytest.fixture(scope="module")
def prompts(smoke_assets: Path) -> list[Prompt]:
    return read_prompts(smoke_assets / "prompts" / "test.txt", 6)


PROTOCOL = EvaluationConfig(
    name="test", seed=5, grid=GridConfig(steps=3, timestep="exact"), resolution=32
)


@pytest.fixture(scope="module")
def sampled(
    policy: Policy, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The images of all prompts."""
    folder = tmp_path_factory.mktemp("sampled")
    sample_images(policy, prompts, PROTOCOL, folder, batch=6)
    return folder


def pixels(folder: Path, prompt: Prompt) -> np.ndarray:
    return np.asarray(Image.open(image_path(folder, prompt))).astype(int)


def test_images_do_not_depend_on_batch_order_or_company(
    policy: Policy, prompts: list[Prompt], sampled: Path, tmp_path: Path
) -> None:
    sample_images(policy, prompts[::-1], PROTOCOL, tmp_path / "pairs", batch=2)
    sample_images(policy, prompts[3:4], PROTOCOL, tmp_path / "alone", batch=1)
    for prompt in prompts:
        difference = np.abs(pixels(sampled, prompt) - pixels(tmp_path / "pairs", prompt))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.001
    alone = np.abs(pixels(tmp_path / "alone", prompts[3]) - pixels(sampled, prompts[3]))
    assert alone.max() <= 1
    other = PROTOCOL.model_copy(update={"seed": 6})
    sample_images(policy, prompts[:1], other, tmp_path / "other", batch=1)
    changed = pixels(tmp_path / "other", prompts[0]) - pixels(sampled, prompts[0])
    assert np.abs(changed).mean() > 5


def test_further_images_of_a_prompt_have_noise_of_their_own(
    policy: Policy, prompts: list[Prompt], tmp_path: Path
) -> None:
    sample_images(policy, prompts[:2], PROTOCOL, tmp_path, batch=2)
    sample_images(policy, prompts[:2], PROTOCOL, tmp_path, batch=2, index=1)
    assert sample_images(policy, prompts[1:2], PROTOCOL, tmp_path, batch=1, index=2) == 1
    sample_images(policy, prompts[1::-1], PROTOCOL, tmp_path / "alone", batch=1, index=1)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {f"00000{end}.png" for end in ("0", "1", "0_1", "1_1", "1_2")}
    images = {
        path.name: np.asarray(Image.open(path)).astype(int) for path in tmp_path.glob("*.png")
    }
    for one, two in (("000001", "000001_1"), ("000001_1", "000001_2"), ("000000", "000000_1")):
        assert np.abs(images[f"{one}.png"] - images[f"{two}.png"]).mean() > 5
    alone = np.asarray(Image.open(tmp_path / "alone" / "000001_1.png")).astype(int)
    assert np.abs(alone - images["000001_1.png"]).max() <= 1
    files = compared_images(prompts, DiversityConfig(prompts=2, images=3), tmp_path, tmp_path / "x")
    assert [str(path.relative_to(tmp_path)) for path in files["000001"]] == [
        "000001.png", "x/000001_1.png", "x/000001_2.png",
    ]  # fmt: skip
    two = compared_images(
        prompts, DiversityConfig(prompts=2, images=3), tmp_path, tmp_path / "x", images=2
    )
    assert [path.parent.name for path in two["000001"]] == [tmp_path.name, tmp_path.name, "x"]
    prune_images(tmp_path, prompts, None, images=3)
    assert len(list(tmp_path.glob("*.png"))) == 5
    prune_images(tmp_path, prompts, 1, images=3)
    assert {path.name for path in tmp_path.glob("*.png")} == {"000000.png", "000000_1.png"}


def test_absent_sections_do_not_change_the_protocol() -> None:
    plain = PROTOCOL.model_dump(mode="json")
    assert not {"diversity", "drift", "hybrid"} & plain.keys()
    section = {"diversity": {"prompts": 2, "images": 2}}
    full = EvaluationConfig.model_validate(plain | section).model_dump(mode="json")
    assert full == plain | {"diversity": {"prompts": 2, "images": 2, "features": "clip"}}


def test_scores_have_a_row_for_each_image_and_reward(
    sampled: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    rewards = {"a": CountingReward(), "b": CountingReward("def")}
    styled = [replace(p, style=("anime", "photo")[i % 2]) for i, p in enumerate(prompts)]
    scores = score_images(rewards, styled, sampled, tmp_path / "scores.parquet")
    assert list(scores["reward"]) == ["a"] * 6 + ["b"] * 6
    assert scores["score"].dtype == np.float32
    for row in scores.itertuples():
        image = Image.open(sampled / str(row.image))
        assert row.score == pytest.approx(np.asarray(image).mean(), abs=1e-3)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "scores.parquet"), scores)
    cell = make_cell("base", seed=None, scores=scores)
    styles = dict(zip(cell.scores["prompt_id"], cell.scores["style"], strict=True))
    assert styles == {prompt.id: prompt.style for prompt in styled}


def test_an_interrupted_scoring_keeps_finished_rewards(
    sampled: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    first, second = CountingReward(), CountingReward("def")

    class Broken(CountingReward):
        def evaluate(self, prepared: Any) -> torch.Tensor:
            raise UserError("out of order")

    output = tmp_path / "scores.parquet"
    with pytest.raises(UserError, match="out of order"):
        score_images({"a": first, "b": Broken("def")}, prompts, sampled, output)
    assert not output.exists()
    again = CountingReward()
    score_images({"a": again, "b": second}, prompts, sampled, output)
    assert (first.asked, again.asked, second.asked) == (6, 0, 6)
    assert sorted(path.name for path in tmp_path.glob("scores*")) == ["scores.parquet"]


def test_a_missing_image_is_named(prompts: list[Prompt], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"000000\.png"):
        score_images({"a": CountingReward()}, prompts, tmp_path, tmp_path / "scores.parquet")


def test_sampling_stops_between_batches_and_resumes(
    policy: Policy,
    prompts: list[Prompt],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = EvaluationConfig(name="tiny", grid=GridConfig(steps=2), resolution=32)
    monkeypatch.setattr(
        ProgressReport,
        "listener",
        lambda shot: StopRequest.request("enough", resume=True) if shot.done == 4 else None,
    )
    try:
        with pytest.raises(Stopped, match="enough"):
            sample_images(policy, prompts, config, tmp_path, batch=2)
    finally:
        monkeypatch.undo()
        StopRequest.clear()
    assert [image_path(tmp_path, prompt).exists() for prompt in prompts] == [True] * 4 + [False] * 2
    before = image_path(tmp_path, prompts[0]).stat().st_mtime_ns
    image_path(tmp_path, prompts[1]).unlink()
    assert sample_images(policy, prompts, config, tmp_path, batch=2) == 3
    assert image_path(tmp_path, prompts[0]).stat().st_mtime_ns == before
