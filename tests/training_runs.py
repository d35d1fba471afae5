"""Tiny training runs on the smoke profile's models, and the weights that they end with."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from g2rpo.data.prompts import prompts_of_iteration, read_prompts
from g2rpo.stop import Stopped, StopRequest
from g2rpo.training.checkpoint.folder import latest_checkpoint
from g2rpo.training.config import TrainConfig
from g2rpo.training.loop import Trainer

ADAPTIVE = {
    "name": "g2rpo",
    "stochastic_steps": "all",
    "granularities": [1, 2],
    "adaptive_steps": {"count": 2, "every": 2},
    "adaptive_granularities": {"threshold": 0.5, "every": 3},
}
"""A method that chooses its rollout by what earlier ones measured."""


class Brightness:
    """A cheap reward whose value differs between images: their mean red minus their mean blue."""

    name, version, weights_hash = "brightness", "1", ""

    def __init__(self, change: Callable[[torch.Tensor, Sequence[str]], torch.Tensor] | None = None):
        self.change = change

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        means = images.float().mean((1, 2)) / 255
        scores = means[:, 0] - means[:, 2]
        return scores if self.change is None else self.change(scores, prompts)


def config_for(assets: Path, **changes: object) -> TrainConfig:
    data = {
        "seed": 3,
        "policy": {
            "source": str(assets / "policy"), "resolution": 32, "max_sequence_length": 16,
        },
        "prompts": {"file": str(assets / "prompts" / "train.txt")},
        "rewards": {"hps": {"reward": {"model": "hps"}}},
        "grid": {"steps": 5},
        "method": {"name": "g2rpo", "granularities": [1, 2], "stochastic_steps": [0, 1]},
        "rollout": {"group_size": 3, "prompts_per_iteration": 2},
        "optimization": {"iterations": 3, "learning_rate": 1e-3},
        "checkpoints": {"every": 1, "keep_last": 2},
        "execution": {"device": "cpu", "trackers": []},
        **changes,
    }  # fmt: skip
    return TrainConfig.model_validate(data)


def trainer_for(
    config: TrainConfig,
    run: Path,
    reward: Brightness | None = None,
    kind: type[Trainer] = Trainer,
) -> Trainer:
    run.mkdir(parents=True, exist_ok=True)
    return kind(config, run, rewards={name: reward or Brightness() for name in config.rewards})


class StopsAtOnce(Trainer):
    """Is asked to stop, and to be resumed, in every iteration."""

    def iterate(self) -> dict[str, object]:
        StopRequest.request("test", resume=True)
        return super().iterate()


def train_one_iteration(config: TrainConfig, run: Path) -> None:
    """Trains until it has obeyed a stop after the first iteration."""
    trainer = trainer_for(config, run, kind=StopsAtOnce)
    with pytest.raises(Stopped):
        trainer.train()
    StopRequest.clear()


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = latest_checkpoint(run)
    assert folder is not None
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def drawn_states(config: TrainConfig) -> int:
    """States that a run of ``config`` trains, with the steps that it will draw for each sample."""
    optimization, size, total = config.optimization, config.rollout.group_size, 0
    prompts = read_prompts(Path(config.prompts.file), config.prompts.limit)
    for iteration in range(optimization.iterations):
        tree = config.method.rollout_tree(config.shape, iteration)
        states = [tree.states[index] for index in tree.recorded]
        steps = sorted({state.node - 1 for state in states})
        for prompt in prompts_of_iteration(
            prompts, config.rollout.prompts_per_iteration, config.seed, iteration
        ):
            trained = [
                config.method.trained_steps(steps, config.seed, iteration, (prompt.id, sample))
                for sample in range(size)
            ]
            # Which samples are selected depends on rewards, but not how many.
            for step in steps:
                mask = config.method.selected(config.shape, step, torch.arange(size)[None].double())
                for sample in range(size):
                    if mask is not None and not mask[0, sample]:
                        trained[sample] = [other for other in trained[sample] if other != step]
            update = [
                0
                if optimization.update_every == "timestep"
                else sample * optimization.updates_per_iteration // size
                for sample in range(size)
            ]
            total += len(
                {
                    (update[state.sample or 0], state.parent)
                    for state in states
                    if state.node - 1 in trained[state.sample or 0]
                }
            )
    return total
