"""Offloaded models are on the device only while they are used."""

from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest
import torch
from engine_runs import config_for, run_to, trained_weights
from torch import Tensor, nn

from g2rpo.offload import on_device
from g2rpo.rewards.base import BatchedReward, RewardConfig
from g2rpo.training.loop import Trainer
from g2rpo.training.scoring import score_slices


class Evaluator(BatchedReward):
    """A reward that fails, and records the moves of its network."""

    name = "evaluator"

    def __init__(self) -> None:
        super().__init__("cuda:0", 4, "7", "abc")
        self.tower = nn.Linear(2, 2)
        self.moves: list[str] = []
        self.tower.to = lambda device: self.moves.append(str(device))  # type: ignore[method-assign, assignment]

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        raise NotImplementedError

    def evaluate(self, prepared: object) -> Tensor:
        assert self.moves == ["cpu", "cuda:0"]
        raise ValueError("as asked")


@pytest.mark.parametrize(
    "score",
    [
        lambda reward, images: reward.score(images, ["a cat"]),
        lambda reward, images: score_slices({"evaluator": reward}, [images], ["a cat"]),
    ],
    ids=["alone", "in a rollout"],
)
def test_a_reward_is_on_its_device_while_it_scores(
    monkeypatch: pytest.MonkeyPatch, score: Callable[[Evaluator, Tensor], object]
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    reward = Evaluator()
    reward.offload()
    with pytest.raises(ValueError, match="as asked"):
        score(reward, torch.zeros(1, 2, 2, 3, dtype=torch.uint8))
    assert reward.moves == ["cpu", "cuda:0", "cpu"]


def test_resident_models_are_not_moved() -> None:
    network = nn.Linear(2, 2)
    with on_device([network], torch.device("meta"), offloaded=False):
        assert network.weight.device.type == "cpu"


def test_offloading_changes_no_number(smoke_assets: Path, tmp_path: Path) -> None:
    everything = {"rewards": True, "vae": True, "text_encoders": True}
    weights = []
    for name, offload in (("resident", {}), ("offloaded", everything)):
        source = str(smoke_assets / "rewards" / "hps")
        config = config_for(
            smoke_assets,
            rewards={"hps": {"reward": {"model": "hps", "source": source}}},
            execution={"offload": offload},
        )
        (tmp_path / name).mkdir()
        trainer = Trainer(config, tmp_path / name)
        assert trainer.engine.rewards["hps"].offloaded == bool(offload)  # type: ignore[attr-defined]
        run_to(trainer, 1)
        weights.append(trained_weights(trainer))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
