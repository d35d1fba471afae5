"""RL iterations on a tiny Stable Diffusion 3."""

from pathlib import Path

import pytest
import torch
from tiny_sd3 import build_tiny_sd3
from training_runs import config_for, train_one_iteration, trainer_for, weights

from benchmarks.evaluation.drift import DriftConfig, base_reference, measure_drift
from g2rpo.data.embeddings import EmbeddingCache, fill
from g2rpo.data.prompts import read_prompts
from g2rpo.errors import UserError
from g2rpo.flow.schedule import GridConfig, build_grid
from g2rpo.policy import load_policy
from g2rpo.sampling import sample_latents, sample_ode
from g2rpo.training.config import TrainConfig
from reproduce.stages import embedding

METHODS = {
    "g2rpo": {"name": "g2rpo", "granularities": [1, 2], "stochastic_steps": [0, 1]},
    "flow_grpo": {"name": "flow_grpo"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sd3(tmp_path_factory.mktemp("sd3") / "pipeline")


def sd3_config(folder: Path, method: str, guidance: float, **changes: object) -> TrainConfig:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red circle\ntwo green triangles\na blue square\n")
    policy = {"source": str(folder), "height": 32, "width": 48, "max_sequence_length": 16}
    data = {
        "policy": policy | {"guidance_scale": guidance},
        "prompts": {"file": str(prompts)},
        "grid": {"steps": 5},
        "method": METHODS[method],
        "optimization": {"iterations": 2, "learning_rate": 1e-3},
    }
    return config_for(folder, **data | changes)


@pytest.mark.parametrize(("guidance", "adapters"), [(1.0, False), (4.5, True)])
@pytest.mark.parametrize("method", METHODS)
def test_iterations(
    folder: Path, tmp_path: Path, method: str, guidance: float, *, adapters: bool
) -> None:
    lora = {"rank": 2, "alpha": 4} if adapters else None
    trainer = trainer_for(sd3_config(folder, method, guidance, lora=lora), tmp_path / "run")
    before = [parameter.detach().clone() for parameter in trainer.weights.parameters]
    rows = [trainer.iterate() for _ in range(2)]
    assert all(row["ratio_deviation"] <= 1e-5 and row["gradient_norm"] > 0 for row in rows)
    moved = [
        not torch.equal(old, new)
        for old, new in zip(before, trainer.weights.parameters, strict=True)
    ]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("approximation", [{"merged_lora": True}, {"fp8": True}])
def test_approximate_continuations(
    folder: Path, tmp_path: Path, approximation: dict[str, bool]
) -> None:
    config = sd3_config(
        folder, "g2rpo", 4.5, lora={"rank": 2, "alpha": 4}, approximate_rollout=approximation
    )
    row = trainer_for(config, tmp_path / "run").iterate()
    assert row["ratio_deviation"] <= 1e-5


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"approximate_rollout": {"step_cache": {"threshold": 0.1}}},
            "step_cache is not supported",
        ),
        ({"execution": {"device": "cpu", "trackers": [], "attention": "math"}}, "use auto"),
    ],
)
def test_what_is_not_supported_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, object], line: str
) -> None:
    config = sd3_config(folder, "g2rpo", 1.0, **changes)
    with pytest.raises(UserError, match=line):
        trainer_for(config, tmp_path / "run")


def test_evaluation_of_a_guided_policy(folder: Path) -> None:
    policy = load_policy(sd3_config(folder, "g2rpo", 4.5).policy, "cpu")
    prompts = read_prompts(folder.parent / "prompts.txt", None)
    grid = build_grid(GridConfig(steps=3, schedule="sd3", timestep="exact"), policy.image_tokens)
    assert sample_ode(policy, prompts, grid, seed=1).shape == (3, 32, 48, 3)
    # Guidance, batches and the place of a prompt leave its image the same.
    alone = sample_latents(policy, prompts[1:2], grid, seed=1)
    together = sample_latents(policy, prompts, grid, seed=1, batch=2)
    torch.testing.assert_close(alone[0], together[1], atol=1e-4, rtol=1e-4)
    drift = DriftConfig(prompts=2, sigmas=(1.0, 0.5))
    reference = base_reference(policy, prompts, drift, grid, seed=1)
    assert reference.latents.shape == (2, 2, *policy.latent_shape)
    assert measure_drift(policy, prompts, drift, reference)["value"].tolist() == [0.0, 0.0]


def test_the_empty_prompt_is_in_the_cache(folder: Path, tmp_path: Path) -> None:
    guided = sd3_config(folder, "g2rpo", 4.5).policy
    use = embedding.PromptUse(folder.parent / "prompts.txt", 2)
    texts = embedding._texts(guided, use)
    assert texts == (*use.read(), "")
    assert embedding._texts(guided.model_copy(update={"guidance_scale": 1.0}), use) == use.read()
    cache = EmbeddingCache(tmp_path / "cache")
    fill(cache, texts, lambda missing: embedding._encoder(guided, torch.device("cpu"), missing), 1)
    cached, encoded = load_policy(guided, "cpu"), load_policy(guided, "cpu")
    cached.conditioning_source = cache
    latents = torch.randn(2, *cached.latent_shape, generator=torch.Generator().manual_seed(4))
    velocities = [
        policy.velocity(latents, torch.tensor([0.9, 0.2]), policy.encode(use.read()))
        for policy in (cached, encoded)
    ]
    assert torch.equal(*velocities)
    assert cached.text_encoders is None


def test_a_killed_run_ends_the_same(folder: Path, tmp_path: Path) -> None:
    config = sd3_config(folder, "g2rpo", 4.5)
    trainer_for(config, tmp_path / "whole").train()
    train_one_iteration(config, tmp_path / "resumed")
    trainer_for(config, tmp_path / "resumed").train()
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
