"""Classifier-free guidance of rollouts and of training: gradients, ratios, counts, refusals."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import GUIDED, config_for, guided, relative, trained_weights
from torch import Tensor
from training_runs import trainer_for

from g2rpo.config import validate
from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.policy.sd3 import SD3Policy
from g2rpo.training.batch import training_batch
from g2rpo.training.config import TrainConfig
from g2rpo.training.counts import training_counts
from g2rpo.training.loop import Trainer
from g2rpo.training.rollout import Rollout

TRANSITIONS = ("rollouts and training", "detached")
"""What objectives on transitions allow."""
FLOW_GRPO: dict[str, Any] = {
    "method": {"name": "flow_grpo"},
    "grid": {"steps": 5, "schedule": "sd3"},
}
DGPO: dict[str, Any] = {
    "method": {"name": "ode"},
    "objective": {"name": "dgpo", "times": {"count": 2, "until": 1.0}},
}


def sd3_config(assets: Path, which: str, **changes: Any) -> TrainConfig:
    return config_for(assets, **guided(assets, which, **changes))


# --- gradients -----------------------------------------------------------------------------------


def velocity(trainer: Trainer, x: Tensor, time: float, prompt: Prompt, *, detach: bool) -> Tensor:
    """v_u + w (v_c - v_u) of one state, from two forwards."""
    policy = trainer.policy
    assert isinstance(policy, SD3Policy)
    times = torch.tensor([time], dtype=x.dtype)
    given, without = (
        policy.forward(x[None], times, policy.encode([text]))[0] for text in (prompt.text, "")
    )
    return 4.5 * given - 3.5 * (without.detach() if detach else without)


def step(x: Tensor, v: Tensor, sigmas: tuple[float, ...], k: int) -> tuple[Tensor, float]:
    """The mean and the std of Flow-GRPO's step from node k, for a noise level of 0.7."""
    sigma, duration = sigmas[k], sigmas[k] - sigmas[k + 1]
    square = 0.49 * sigma / (1 - (sigmas[1] if k == 0 else sigma))
    mean = x * (1 - square * duration / (2 * sigma))
    mean = mean - v * (1 + square * (1 - sigma) / (2 * sigma)) * duration
    return mean, math.sqrt(square * duration)


def log_prob(following: Tensor, mean: Tensor, std: float) -> Tensor:
    return -((following - mean) ** 2).mean() / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))


Transition = tuple[Tensor, Tensor, int, Prompt, float]
"""x_k, x_{k+1}, k, the prompt and the advantage."""


def transitions(trainer: Trainer, rollout: Rollout, prompts: list[Prompt]) -> list[Transition]:
    advantages = trainer.advantages(rollout).by_step
    return [
        (
            recorded.sources[p, recorded.source_of[n]],
            recorded.next_latents[p, n],
            recorded.step,
            prompts[p],
            float(values[p, g]),
        )
        for recorded, values in zip(rollout.recorded, advantages, strict=True)
        for p in range(len(prompts))
        for n, g in enumerate(recorded.samples)
    ]


@pytest.mark.parametrize("which", TRANSITIONS)
def test_the_gradient_of_transitions_equals_that_of_a_plain_loop(
    smoke_assets: Path, tmp_path: Path, which: str
) -> None:
    optimization = {"kl_coefficient": 0.1, "clip_range": 0.01, "ratio_tolerance": 1.0}
    config = sd3_config(
        smoke_assets, which, policy={"dtype": "float64"}, optimization=optimization, **FLOW_GRPO
    )
    trainer = trainer_for(config, tmp_path)
    prompts = trainer.local_prompts()
    rollout = trainer.rollout(prompts)
    batch = training_batch(rollout, prompts, config, trainer.advantages(rollout))
    batch, _ = trainer.updater.with_frozen(batch)
    sigmas, times = trainer.grid.sigmas, trainer.grid.timesteps
    detach = which == "detached"
    taken = transitions(trainer, rollout, prompts)
    with torch.no_grad():
        before = [velocity(trainer, x, times[k], p, detach=False) for x, _, k, p, _ in taken]
        for number, parameter in enumerate(trainer.weights.parameters):
            draws = torch.Generator().manual_seed(number)
            noise = torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.002)
    statistics, parts = trainer.updater.gradient(batch)

    losses, clipped = [], 0
    for (x, following, k, prompt, advantage), old in zip(taken, before, strict=True):
        mean, std = step(x, velocity(trainer, x, times[k], prompt, detach=detach), sigmas, k)
        base, _ = step(x, old, sigmas, k)
        ratio = torch.exp(log_prob(following, mean, std) - log_prob(following, base, std))
        clipped += abs(float(ratio.detach()) - 1) > 0.01
        limited = ratio.clamp(0.99, 1.01)
        kl = ((mean - base) ** 2).mean() / (2 * std**2)
        losses.append(torch.maximum(-advantage * ratio, -advantage * limited) + 0.1 * kl)
    parameters = trainer.weights.parameters
    wanted = torch.autograd.grad(torch.stack(losses).mean(), parameters, allow_unused=True)
    names = [name for name, _ in trainer.weights.named]
    found = dict(zip(names, parts, strict=True))
    expected = {
        name: torch.zeros_like(found[name]) if part is None else part
        for name, part in zip(names, wanted, strict=True)
    }
    assert relative(found, expected, None) < 1e-9
    assert 0 < statistics.clipped == clipped < len(taken)


# --- the ratio and the counts --------------------------------------------------------------------


@pytest.mark.parametrize("which", TRANSITIONS)
@pytest.mark.parametrize("objective", ["clipped", "guard", "dppo"])
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4, "target_modules": "attention"}])
def test_the_ratio_is_1_before_an_update(
    smoke_assets: Path, tmp_path: Path, which: str, objective: str, lora: dict[str, Any] | None
) -> None:
    config = sd3_config(smoke_assets, which, objective={"name": objective}, lora=lora, **FLOW_GRPO)
    trainer = trainer_for(config, tmp_path)
    start = trained_weights(trainer)
    for _ in range(2):
        row = trainer.iterate()
        assert row["ratio_deviation"] <= 1e-5
    assert relative(trained_weights(trainer), start, None) > 0


class Counting(Trainer):
    """Counts the rows of the transformer's forwards."""

    sampling = False

    def rollout(self, prompts: list[Prompt]) -> Rollout:
        self.sampling = True
        try:
            return super().rollout(prompts)
        finally:
            self.sampling = False

    def watch(self) -> dict[str, int]:
        rows = {"rollout_evaluations": 0, "training_forwards": 0, "training_backwards": 0}

        def count(module: object, arguments: object, keywords: dict[str, Tensor]) -> None:
            new = len(keywords["hidden_states"])
            rows["rollout_evaluations" if self.sampling else "training_forwards"] += new
            rows["training_backwards"] += new * torch.is_grad_enabled()

        self.policy.transformer.register_forward_pre_hook(count, with_kwargs=True)
        return rows


@pytest.mark.parametrize(
    ("settings", "which"),
    [*((FLOW_GRPO, which) for which in TRANSITIONS), *((DGPO, which) for which in GUIDED)],
)
def test_counts_are_the_rows_that_the_transformer_sees(
    smoke_assets: Path, tmp_path: Path, settings: dict[str, Any], which: str
) -> None:
    optimization = {"kl_coefficient": 0.1, "iterations": 2}
    lora = {"rank": 2, "alpha": 4}  # so that the base is the same transformer
    config = sd3_config(smoke_assets, which, optimization=optimization, lora=lora, **settings)
    trainer = trainer_for(config, tmp_path, kind=Counting)
    assert isinstance(trainer, Counting)
    seen = trainer.watch()
    row = [trainer.iterate() for _ in range(2)][-1]
    planned = training_counts(config)
    assert seen == {name: row[name] for name in seen}
    assert seen == {name: getattr(planned, name) for name in seen}
    guidance = config.guidance
    states = seen["training_backwards"] / (
        1 if guidance.detach_unconditional or guidance.training_scale == 1.0 else 2
    )
    assert states == 2 * 4 * (1 + 3 * 3 if settings is FLOW_GRPO else 3 * 2)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["clipped", "guard", "dppo"])
def test_transitions_are_trained_with_the_guidance_of_their_rollout(
    smoke_assets: Path, objective: str
) -> None:
    config = sd3_config(smoke_assets, "detached", objective={"name": objective})
    data = config.model_dump(mode="json") | {"guidance": {"training_scale": 1.0}}
    with pytest.raises(UserError, match=r"guidance.training_scale=1 differs from .*=4.5") as caught:
        validate(TrainConfig, data, "run")
    assert "\n" not in str(caught.value) and f"objective.name={objective}" in str(caught.value)
    assert validate(TrainConfig, data | {"guidance": {"training_scale": 4.5}}, "run")


def test_detaching_needs_guidance_without_a_classifier(smoke_assets: Path, tmp_path: Path) -> None:
    for changes in (
        {"policy": {"guidance_scale": 1.0}},
        {"guidance": {"training_scale": 1.0}, **DGPO},
    ):
        with pytest.raises(ValueError, match="needs guidance above 1 in training"):
            sd3_config(smoke_assets, "detached", **changes)
    flux = config_for(smoke_assets, guidance=GUIDED["detached"])
    with pytest.raises(UserError, match=r"detach_unconditional needs .*FluxPipeline.* remove it"):
        trainer_for(flux, tmp_path)


def test_a_pipeline_that_is_not_that_of_the_folder_is_refused(
    smoke_assets: Path, tmp_path: Path
) -> None:
    wrong = config_for(smoke_assets, policy={"pipeline": "StableDiffusion3Pipeline"})
    with pytest.raises(UserError, match=r"policy.pipeline is .*, but .* has a FluxPipeline"):
        trainer_for(wrong, tmp_path)
    with pytest.raises(ValueError, match="did you mean 'FluxPipeline'"):
        config_for(smoke_assets, policy={"pipeline": "FluxPipelin"})
