"""What waits elsewhere comes for its work alone. The meta device stands for a GPU here."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine_runs import config_for, run_to, trained_weights
from torch import Tensor, nn

from g2rpo.offload import on_device
from g2rpo.rewards.offload import OffloadedReward
from g2rpo.training.loop import Trainer


class Part:
    def __init__(self) -> None:
        self.network = nn.Linear(2, 2)


Part.__module__ = "g2rpo.rewards.part"


class Judge:
    """A reward with one network of its own and one in a part of it."""

    name, version, weights_hash = "judge", "7", "abc"

    def __init__(self) -> None:
        self.tower = nn.Linear(2, 2)
        self.part = Part()
        self.seen: list[str] = []

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen += [m.weight.device.type for m in (self.tower, self.part.network)]
        if prompts[0] == "fail":
            raise ValueError("as asked")
        return torch.ones(len(images))


def test_a_reward_is_on_its_device_while_it_scores() -> None:
    judge = Judge()
    devices: list[str] = []
    for network in (judge.tower, judge.part.network):
        network.to = lambda device, n=network: devices.append(str(device)) or n  # type: ignore[method-assign, misc]
    offloaded = OffloadedReward(judge, torch.device("cuda:0"))
    assert devices == ["cpu", "cpu"]
    assert (offloaded.name, offloaded.version, offloaded.weights_hash) == ("judge", "7", "abc")
    devices.clear()
    with pytest.raises(ValueError, match="as asked"):
        _score_without_gpu(offloaded)
    assert devices == ["cuda:0", "cuda:0", "cpu", "cpu"]


def _score_without_gpu(offloaded: OffloadedReward) -> None:
    original, torch.cuda.empty_cache = torch.cuda.empty_cache, lambda: None  # type: ignore[assignment]
    try:
        offloaded.score(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), ["fail"])
    finally:
        torch.cuda.empty_cache = original  # type: ignore[assignment]


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
        assert isinstance(trainer.engine.rewards["hps"], OffloadedReward) == bool(offload)
        run_to(trainer, 1)
        weights.append(trained_weights(trainer))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
