"""One iteration of the objectives on the forward process, image by image in plain loops."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import GUIDED, config_for, guided, relative, trained_weights
from torch import Tensor
from training_runs import Brightness, trainer_for

from g2rpo.config import merge
from g2rpo.policy.sd3 import SD3Policy
from g2rpo.seeds import gaussian
from g2rpo.training.batch import training_batch
from g2rpo.training.config import TrainConfig
from g2rpo.training.forward import ForwardObjective
from g2rpo.training.loop import Trainer

OLD = {"slope": 0.3, "limit": 0.9}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "nft": {"name": "nft", "old": OLD},
    "awm": {"name": "awm", "times": {"count": 2}, "old": OLD},
    "dgpo": {
        "name": "dgpo", "times": {"count": 2, "until": 1.0}, "old": OLD | {"rollouts_after": 1},
    },
}  # fmt: skip
DONE = 2
"""Iterations before the one that is compared: the old policy has fallen behind."""


def square(difference: Tensor) -> Tensor:
    return (difference**2).mean()


def nft(v: Tensor, old: Tensor, u: Tensor, t: float, a: float) -> Tensor:
    share = min(max(a / 10 + 0.5, 0.0), 1.0)
    sides = []
    for mixed in (v, 2 * old - v):
        error = t * (mixed - u)
        sides.append(square(error) / max(float(error.detach().abs().mean()), 1e-5))
    return 5 * (share * sides[0] + (1 - share) * sides[1])


def awm(v: Tensor, old: Tensor, u: Tensor, t: float, a: float) -> Tensor:
    value = -((square(v - u) + 1e-10) ** 0.25 - 1e-10**0.25) * t / 0.25
    return -a / 5 * torch.exp(value - value.detach()) + square(v - old)


def dgpo(v: Tensor, old: Tensor, u: Tensor, a: float, preference: float) -> Tensor:
    m = square(v - u)
    ratio = math.exp(float(square(old - u)) - float(m.detach()))
    out = ratio > 1.01 if a > 0 else ratio < 0.99
    return preference * a * (m.detach() if out else m)


Row = tuple[Tensor, Tensor, float]
"""x_t, eps - x_0 and t of a noised image."""


class Plain:
    """The next iteration of a trainer, with weights set by hand for every velocity."""

    sampling = False
    """Whether velocities are those of a rollout."""

    def __init__(self, trainer: Trainer, base: dict[str, Tensor]) -> None:
        assert trainer.old is not None
        self.trainer, self.policy = trainer, trainer.policy
        self.prompts = trainer.local_prompts()
        self.parameters = dict(trainer.weights.named)
        old = dict(zip(self.parameters, (p.clone() for p in trainer.old.parameters), strict=True))
        new = {key: value.detach().clone() for key, value in self.parameters.items()}
        self.weights = {"new": new, "old": old, "base": base}

    @torch.no_grad()
    def hold(self, which: str) -> None:
        for key, parameter in self.parameters.items():
            parameter.copy_(self.weights[which][key])

    def velocity(self, which: str, x: Tensor, t: float, prompt: int) -> Tensor:
        self.hold(which)
        text, empty = (self.policy.encode([text]) for text in (self.prompts[prompt].text, ""))
        config, time = self.trainer.config, torch.tensor([t], dtype=x.dtype)
        own = config.guidance.training_scale
        scale = config.policy.guidance_scale if self.sampling or own is None else own
        with torch.set_grad_enabled(which == "new"):
            if not isinstance(self.policy, SD3Policy):
                return self.policy.velocity(x[None], time, text)[0]
            given = self.policy.forward(x[None], time, text)[0]
            without = self.policy.forward(x[None], time, empty)[0]
        if config.guidance.detach_unconditional:
            without = without.detach()
        return scale * given + (1 - scale) * without

    def images(self, prompt: int, sampler: str) -> list[Tensor]:
        """Euler steps from each sample's noise."""
        self.sampling = True
        grid, found = self.trainer.grid, []
        noise = self.trainer.engine.noise(self.prompts, DONE)
        for g in range(self.trainer.config.rollout.group_size):
            x = noise(prompt, g, -1).double()
            for k in range(grid.steps):
                v = self.velocity(sampler, x, grid.timesteps[k], prompt).detach()
                x = x + v * (grid.sigmas[k + 1] - grid.sigmas[k])
            found.append(x)
        self.sampling = False
        return found

    def advantages(self, prompt: int, images: list[Tensor]) -> list[float]:
        text = [self.prompts[prompt].text]
        scores = [Brightness().score(self.policy.decode(x[None]), text)[0] for x in images]
        values = torch.stack(scores).double()
        return [float(a) for a in ((values - values.mean()) / (values.std() + 1e-8)).clamp(-5, 5)]

    def noised(self, prompt: int, images: list[Tensor], slot: int) -> list[Row]:
        config, sigmas, key = self.trainer.config, self.trainer.grid.sigmas, self.prompts[prompt].id
        objective = config.objective
        assert isinstance(objective, ForwardObjective)
        rule, found = objective.times, []
        for g, x in enumerate(images):
            shared: dict[str, Any] = {"sample": (key, 0, g), "group": (key, 0)}
            drawn = rule.draw(len(sigmas) - 1, config.seed, DONE, *shared.get(rule.shared, ()))
            own = () if rule.shared_noise else (g,)
            eps = gaussian(x.shape, config.seed, "training-noise", DONE, key, 0, slot, *own)
            t = sigmas[drawn[slot]]
            found.append(((1 - t) * x + t * eps.double(), eps.double() - x, t))
        return found

    def preference(self, prompt: int, rows: list[Row], a: list[float]) -> float:
        """DGPO's sigmoid of a group at one time."""
        total = 0.0
        for (x, u, t), advantage in zip(rows, a, strict=True):
            new, base = (self.velocity(w, x, t, prompt).detach() for w in ("new", "base"))
            total += 100 * advantage * float(square(new - u) - square(base - u)) / len(rows)
        return 1 / (1 + math.exp(-total))

    def add_prompt(self, name: str, prompt: int, slots: int) -> None:
        """Adds the gradients of a prompt's noised images."""
        images = self.images(prompt, "new" if name == "awm" else "old")
        a = self.advantages(prompt, images)
        for slot in range(slots):
            rows = self.noised(prompt, images, slot)
            preference = self.preference(prompt, rows, a) if name == "dgpo" else 0.0
            for (x, u, t), advantage in zip(rows, a, strict=True):
                old, base = (self.velocity(w, x, t, prompt).detach() for w in ("old", "base"))
                v = self.velocity("new", x, t, prompt)
                if name == "dgpo":
                    loss = dgpo(v, old, u, advantage, preference)
                else:
                    loss = (nft if name == "nft" else awm)(v, old, u, t, advantage)
                self.add(loss + 0.1 * square(v - base))

    def gradient(self, name: str, slots: int) -> dict[str, Tensor]:
        """The gradient of the mean loss."""
        self.total = {key: torch.zeros_like(value) for key, value in self.parameters.items()}
        self.count = 0
        for prompt in range(len(self.prompts)):
            self.add_prompt(name, prompt, slots)
        self.hold("new")
        return {key: value / self.count for key, value in self.total.items()}

    def add(self, loss: Tensor) -> None:
        """Adds a gradient before the weights are set to others."""
        parts = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for key, part in zip(self.parameters, parts, strict=True):
            self.total[key] += 0 if part is None else part
        self.count += 1


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("guidance", [None, *GUIDED])
def test_the_gradient_of_an_iteration_equals_that_of_plain_loops(
    smoke_assets: Path, tmp_path: Path, name: str, guidance: str | None
) -> None:
    config: TrainConfig = config_for(
        smoke_assets,
        method={"name": "ode"},
        objective=OBJECTIVES[name],
        optimization={"clip_range": 0.01, "kl_coefficient": 0.1},
        **merge(
            {"policy": {"dtype": "float64"}},
            {} if guidance is None else guided(smoke_assets, guidance),
        ),
    )
    trainer = trainer_for(config, tmp_path)
    base = {key: value.clone() for key, value in trained_weights(trainer).items()}
    for _ in range(DONE):
        trainer.iterate()
    wanted = Plain(trainer, base).gradient(name, 4 if name == "nft" else 2)

    prompts = trainer.local_prompts()
    rollout = trainer.rollout(prompts)
    batch = training_batch(rollout, prompts, config, trainer.advantages(rollout))
    batch, _ = trainer.updater.with_frozen(batch)
    _, parts = trainer.updater.gradient(batch)
    found = dict(zip(wanted, parts, strict=True))
    assert relative(found, wanted, None) < 1e-7
