"""Whole iterations of the trainer against the released procedures, written out as plain loops.

Both sides start from the mini world's committed policy and reward models, under the ``released``
settings, of which sizes are cut. What differs is the order of floating-point sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from released_methods import G2RPO, DanceGRPO, Found, Method, MixGRPO, MixGRPOFlash, Models
from torch import Tensor
from training_runs import weights

from g2rpo.rewards.registry import load_reward
from g2rpo.training.advantages import TransitionAdvantages
from g2rpo.training.batch import training_batch
from g2rpo.training.config import TrainConfig
from g2rpo.training.loop import Trainer
from g2rpo.training.metrics import read_metrics
from g2rpo.training.rollout import Rollout
from reproduce.experiment import load_experiment, load_profile, resolve, reward_configs

SEED, CLIP_RANGE = 5, 1e-4
CONTROL = 5e-3
"""How far apart each quantity is at least where eta is another by one percent."""
EXPERIMENT, PROFILE = load_experiment("released-vs-matched"), load_profile("mini")
REWARDS = reward_configs(PROFILE)

Quantities = dict[str, tuple[Tensor, Tensor]]
"""By name: values, and what they are measured from (of images and rewards, their group's mean)."""


@dataclass(frozen=True)
class Case:
    """One method on both sides.

    Attributes:
        plain: the reference, which has the released values by itself.
        cell: whose released settings the trainer has.
        changes: what is cut of them, as ``--set`` takes it.
        rewards: their weights.
        clips: whether later optimizer steps are off-policy enough to be clipped.
    """

    plain: Method
    cell: str
    changes: Mapping[str, Mapping[str, Any]]
    rewards: Mapping[str, float] = field(default_factory=lambda: {"hps": 1.0})
    iterations: int = 1
    dtype: str = "float64"
    clips: bool = True

    @property
    def tolerances(self) -> dict[str, float]:
        # In float64 too diffusers rotates queries and keys in float32, and their gradients with
        # them: summed over samples that share a state, they differ by 1e-8. In float32 some pixels
        # round to another byte, and where a gradient is about zero Adam's first step is its sign.
        if self.dtype == "float64":
            return dict.fromkeys(("images", "rewards", "log-probs", "advantages"), 1e-9) | {
                "gradients": 1e-7, "weights": 2e-6,
            }  # fmt: skip
        return {"images": 1e-4, "log-probs": 1e-5, "weights": 1e-2}


def sizes(steps: int, group_size: int) -> dict[str, Mapping[str, Any]]:
    rollout = {"group_size": group_size, "prompts_per_iteration": 2}
    return {"grid": {"steps": steps}, "rollout": rollout}


DANCE_8_GPUS = Case(
    DanceGRPO(6, 4, updates=2, max_grad_norm=0.01),
    "released/dance_grpo",
    sizes(6, 4) | {"optimization": {"updates_per_iteration": 2, "max_grad_norm": 0.01}},
)
CASES = {
    "G2RPO, HPS script": Case(
        G2RPO(8, 3, stochastic_steps=(0, 1)),
        "released/g2rpo",
        sizes(8, 3) | {"method": {"stochastic_steps": [0, 1]}},
        clips=False,
    ),
    "G2RPO, HPS & CLIP script": Case(
        G2RPO(6, 4, stochastic_steps=(0, 3), per_step=False, advantage_clip=2.0),
        "released/g2rpo",
        sizes(6, 4) | {
            "method": {"stochastic_steps": [0, 3]},
            "optimization": {"update_every": "iteration"},
            "advantage": {"clip": 2.0},
        },
        rewards={"hps": 1.0, "clip": 1.0},
        clips=False,
    ),
    "DanceGRPO, 16 GPUs": Case(DanceGRPO(7, 6), "released/dance_grpo", sizes(7, 6)),
    "DanceGRPO, 8 GPUs": DANCE_8_GPUS,
    "DanceGRPO, 8 GPUs, float32": replace(DANCE_8_GPUS, dtype="float32"),
    # The window holds steps 0 to 3, and in the second iteration 2 and 3, the last that are trained.
    # At thrice the released learning rate the second optimizer step of either is clipped.
    "MixGRPO": Case(
        MixGRPO(6, 4, stride=2, interval=1, learning_rate=3e-5),
        "released/mix_grpo",
        sizes(6, 4) | {
            "method": {"stride": 2, "interval": 1},
            "optimization": {"learning_rate": 3e-5},
        },
        rewards={"hps": 3.0, "clip": 1.0},
        iterations=2,
    ),
    # Three solver steps after the window: two of second order and the last.
    "MixGRPO-Flash": Case(
        MixGRPOFlash(14, 4, learning_rate=3e-5),
        "released/mix_grpo",
        sizes(14, 4) | {
            "method": {"post_window_ratio": 0.4},
            "optimization": {"learning_rate": 3e-5},
        },
        clips=False,
    ),
}  # fmt: skip


class Recorder(Trainer):
    """The trainer, with what it computed in each iteration."""

    def __init__(self, config: TrainConfig, run: Path) -> None:
        super().__init__(config, run)
        self.found: list[Found] = []
        self.texts: list[dict[str, str]] = []
        self._decoded: list[Tensor] = []
        decoder = self.policy.vae.decoder
        decoder.register_forward_hook(lambda _, given, pixels: self._decoded.append(pixels))
        self.optimizer.register_step_pre_hook(lambda *_: self._keep_gradients())

    def _keep_gradients(self) -> None:
        gradients = [p.grad.flatten() for p in self.weights.parameters if p.grad is not None]
        self.found[-1].gradients.append(torch.cat(gradients))

    def advantages(self, rollout: Rollout) -> TransitionAdvantages:
        advantages, prompts = super().advantages(rollout), self.local_prompts()
        batch = training_batch(rollout, prompts, self.config, advantages)
        found, tree = Found(), rollout.tree
        pixels = torch.cat(self._decoded).unflatten(0, (len(prompts), -1))
        self._decoded.clear()
        for row, prompt in enumerate(prompts):
            for place, group in enumerate(tree.groups):
                key = (prompt.id, group.step, group.granularity)
                images = [tree.images.index(image) for image in group.images]
                found.pixels[key] = list(pixels[row, images])
                for name in rollout.rewards:
                    scores = rollout.group_rewards(name)[row, place]
                    found.rewards[name][key] = scores.tolist()
        for index, state in enumerate(batch.state_of.tolist()):
            prompt_id = prompts[int(batch.prompts[state])].id
            transition = (prompt_id, int(batch.samples[index]), batch.steps[state])
            found.log_probs[transition] = float(batch.log_prob[index])
            found.advantages[transition] = float(batch.advantage[index])
        self.found.append(found)
        self.texts.append({prompt.id: prompt.text for prompt in prompts})
        return advantages


def config_of(case: Case) -> TrainConfig:
    """What ``g2rpo train released-vs-matched CELL`` trains with the case's changes."""
    # One image at a time, as the plain side scores: the float32 rewards agree to the last bit.
    rewards = {
        name: {"reward": REWARDS[name].model_dump() | {"batch_size": 1}, "weight": weight}
        for name, weight in case.rewards.items()
    }
    optimization = {"iterations": case.iterations, **case.changes.get("optimization", {})}
    changes = {
        **case.changes,
        "policy": {"dtype": case.dtype},
        "rewards": rewards,
        "optimization": optimization,
        "validation": None,
        "execution": {"device": "cpu", "trackers": []},
    }
    config = resolve(EXPERIMENT, PROFILE, case.cell, SEED, changes).train
    assert config is not None
    return config


def run_plain(
    method: Method, case: Case, models: Models, texts: Sequence[Mapping[str, str]]
) -> tuple[list[Found], Quantities]:
    """The reference's iterations on the given prompts."""
    scorers = {name: load_reward(REWARDS[name], "cpu") for name in case.rewards}
    rewards = {
        name: lambda image, text, scorer=scorer: float(scorer.score(image[None], [text]))
        for name, scorer in scorers.items()
    }
    method.begin(models, rewards, case.rewards, SEED)
    found = [method.iterate(one) for one in texts]
    return found, quantities(found, method.transformer.state_dict(), models)


def quantities(found: Sequence[Found], trained: Mapping[str, Tensor], models: Models) -> Quantities:
    def ordered(values: Mapping[Any, Any]) -> list[Any]:
        return [values[key] for key in sorted(values, key=repr)]

    def numbers(name: str) -> Tensor:
        each = [value for one in found for value in ordered(getattr(one, name))]
        return torch.tensor(each, dtype=torch.float64)

    images = torch.stack([torch.stack(group) for one in found for group in ordered(one.pixels)])
    scores = [by_group for one in found for by_group in ordered(one.rewards)]
    rewards = torch.tensor([group for by_group in scores for group in ordered(by_group)])
    base = models.transformer.state_dict()
    vectors = [torch.cat([one[name].flatten() for name in base]) for one in (trained, base)]
    zero = torch.zeros(())
    return {
        "images": (images, images.mean(1, keepdim=True)),
        "rewards": (rewards, rewards.mean(1, keepdim=True)),
        "log-probs": (numbers("log_probs"), numbers("log_probs").mean()),
        "advantages": (numbers("advantages"), zero),
        "gradients": (torch.cat([g for one in found for g in one.gradients]), zero),
        "weights": (vectors[0], vectors[1]),
    }


def distances(ours: Quantities, theirs: Quantities) -> dict[str, float]:
    """How far apart each quantity is, by how far ours is from where it is measured."""
    return {
        name: float((theirs[name][0] - value).norm() / (value - origin).norm())
        for name, (value, origin) in ours.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_iterations_are_those_of_the_released_procedure(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    models = Models(Path(PROFILE.policy.source), getattr(torch, case.dtype))
    trainer = Recorder(config_of(case), tmp_path)
    trainer.train()
    ours = quantities(trainer.found, weights(tmp_path), models)
    plain = replace(case.plain)
    found, theirs = run_plain(plain, case, models, trainer.texts)

    for mine, other in zip(trainer.found, found, strict=True):
        assert mine.pixels.keys() == other.pixels.keys()
        assert mine.log_probs.keys() == other.log_probs.keys()
        assert len(mine.gradients) == len(other.gradients)
    apart = distances(ours, theirs)
    tolerances = dict.fromkeys(apart, 1e-3) | case.tolerances
    assert {n: d for n, d in apart.items() if not d <= tolerances[n]} == {}

    # Controls: a small change of the method is far beyond all of the tolerances.
    other_eta = replace(case.plain, eta=1.01 * case.plain.eta)
    control = distances(ours, run_plain(other_eta, case, models, trainer.texts)[1])
    assert {n: d for n, d in control.items() if not d > max(CONTROL, tolerances[n])} == {}
    plain.ddof = 0
    advantages = torch.tensor([plain.advantage(t) for t in plain.trained])
    expected = torch.tensor([trainer.found[-1].advantages[t.key] for t in plain.trained])
    assert (advantages - expected).norm() > CONTROL * expected.norm()

    for row, one in zip(read_metrics(tmp_path / "metrics.jsonl"), found, strict=True):
        outside = [key for key, ratio in one.ratios.items() if abs(ratio - 1) > CLIP_RANGE]
        assert row["clipped_fraction"] == pytest.approx(len(outside) / len(one.ratios))
        # Where the ratio has left the range in the advantage's direction, no gradient is left.
        bound = [key for key in outside if (one.ratios[key] - 1) * one.advantages[key] > 0]
        assert bool(bound) == case.clips
        for reward, values in one.logged.items():
            mean = sum(values) / len(values)
            assert row[f"reward/{reward}/anchor"] == pytest.approx(mean, rel=1e-6)
