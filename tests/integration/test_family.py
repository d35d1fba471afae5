"""Every method on the paths of ``flux`` and ``sd35``, as released on SD3.5, and timed."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from training_runs import trainer_for
from two_ranks import on_two_ranks

from benchmarks.speed.methods import main, report
from g2rpo.data.prompts import read_prompts
from g2rpo.files import write_json
from g2rpo.flow.schedule import GridConfig, build_grid
from g2rpo.methods.presets import load_preset, method_label, preset_names
from g2rpo.sampling import evaluation_noise, sample_ode
from g2rpo.training.checkpoint.load import export_trained
from g2rpo.training.config import PromptsConfig, TrainConfig
from reproduce.experiment.cells import load_experiment
from reproduce.experiment.profile import load_profile
from reproduce.experiment.resolving import expand, resolve

SD3 = "StableDiffusion3Pipeline"
CELLS = [key for key, cell in load_experiment("family").cells.items() if cell.method is not None]
PROFILES = ("flux-tiny", "sd35-tiny")

RELEASED = sorted(name for name in preset_names() if "lora" in load_preset(name, "released", SD3))
"""The methods whose code trains Stable Diffusion 3.5."""


def on_assets(config: TrainConfig | None, assets: Path) -> TrainConfig:
    """``config`` with the tiny models and prompts in ``assets``."""
    assert config is not None
    source = assets / Path(config.policy.source).name
    policy = config.policy.model_copy(update={"source": str(source)})
    prompts = PromptsConfig(file=str(assets / "prompts" / "train.txt"))
    changes = {"policy": policy, "prompts": prompts, "validation": None, "pictures": None}
    return config.model_copy(update=changes)


def released_on_sd35(assets: Path, method: str) -> TrainConfig:
    """The preset ``released`` of ``method`` on the profile sd35-smoke, with fewer samples."""
    experiment = load_experiment("family")
    cell = experiment.cells["hps/g2rpo"].model_copy(update={"method": method})
    released = experiment.model_copy(update={"preset": "released", "cells": {"cell": cell}})
    few = {"rollout": {"group_size": 4, "prompts_per_iteration": 2}}
    return on_assets(resolve(released, load_profile("sd35-smoke"), "cell", 1, few).train, assets)


def train_each(assets: Path, folder: Path) -> None:
    found = {}
    for profile in PROFILES:
        for cell in expand(load_experiment("family"), load_profile(profile), (1,)):
            if cell.key in CELLS:
                name = f"{profile} {cell.key}"
                trainer = trainer_for(on_assets(cell.train, assets), folder / name)
                found[name] = trainer.iterate()
    if trainer.accelerator.is_main_process:
        (folder / "rows.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def rows(
    smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("family")
    assert on_two_ranks(train_each, smoke_assets, folder) == 0
    found: dict[str, dict[str, float]] = json.loads((folder / "rows.json").read_text())
    return found


@pytest.mark.parametrize("key", CELLS)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_method_trains_for_an_iteration(
    rows: dict[str, dict[str, float]], profile: str, key: str
) -> None:
    row = rows[f"{profile} {key}"]
    assert row["gradient_norm"] > 0
    assert row["training_backwards"] > 0
    assert row["ratio_deviation"] <= 2e-5


@pytest.mark.parametrize("method", RELEASED)
def test_a_method_released_on_sd35_trains_for_an_iteration(
    smoke_assets: Path, tmp_path: Path, method: str
) -> None:
    trainer = trainer_for(released_on_sd35(smoke_assets, method), tmp_path)
    assert trainer.policy.has_lora
    row = trainer.iterate()
    assert row["gradient_norm"] > 0
    assert row["ratio_deviation"] <= 2e-5


def test_a_lora_trained_on_sd35_gives_diffusers_the_same_images(
    smoke_assets: Path, tmp_path: Path
) -> None:
    config, run = released_on_sd35(smoke_assets, "flow_grpo"), tmp_path / "run"
    optimization = config.optimization.model_copy(
        update={"iterations": 2, "learning_rate": 0.1, "ema_decay": None}
    )
    config = config.model_copy(update={"optimization": optimization})
    trainer = trainer_for(config, run)
    trainer.train()
    write_json(run / "config.json", config.model_dump(mode="json"))
    assert export_trained(run, tmp_path / "lora") == "LoRA file of iteration-000002"

    pipeline = StableDiffusion3Pipeline.from_pretrained(config.policy.source)
    pipeline.set_progress_bar_config(disable=True)
    prompts = read_prompts(Path(config.prompts.file), 2)
    noise = torch.stack([evaluation_noise(trainer.policy, 5, prompt) for prompt in prompts])

    def images() -> Tensor:
        output = pipeline(
            [prompt.text for prompt in prompts],
            height=config.policy.resolution,
            width=config.policy.resolution,
            num_inference_steps=4,
            guidance_scale=4.5,
            max_sequence_length=config.policy.max_sequence_length,
            latents=noise,
            output_type="np",
        )
        return 255 * torch.from_numpy(output.images)

    base = images()
    pipeline.load_lora_weights(tmp_path / "lora")
    grid = build_grid(GridConfig(steps=4, schedule="sd3", timestep="exact"), image_tokens=1)
    trained = sample_ode(trainer.policy, prompts, grid, seed=5).float()
    assert (images() - trained).abs().max() < 0.6
    assert (images() - base).abs().mean() > 2


def test_methods_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind: transitions, a tree, and the forward process."""
    names = ["dance_grpo", "branch_grpo", "diffusion_nft"]
    monkeypatch.setattr("benchmarks.speed.methods.preset_names", lambda: names)
    main("tiny", "cpu", 1, tmp_path)
    result = json.loads((tmp_path / "methods-tiny.json").read_text())
    assert [m["label"] for m in result["methods"]] == [method_label(name) for name in names]
    for method in result["methods"]:
        parts = method["seconds/sampling"] + method["seconds/training"]
        assert 0 < parts < method["device_seconds"]
    page = (tmp_path / "methods-tiny.md").read_text()
    assert page.count("\n| ") == len(names) + 2


def test_the_page_shows_a_method_that_costs_twice_its_evaluations() -> None:
    plain = {
        "rollout_evaluations": 100, "training_forwards": 10, "training_backwards": 10,
        "images_scored": 5, "device_seconds": 3.0, "seconds/sampling": 1.0, "seconds/training": 0.6,
    }  # fmt: skip
    methods = [plain | {"label": key} for key in ("a", "b", "slow")]
    methods[2] |= {"seconds/sampling": 2.0}
    page = report({"size": "p", "device": "cpu", "threads": 1, "repeats": 1, "methods": methods})
    (row,) = [line for line in page.splitlines() if line.startswith("| slow")]
    assert row.endswith("| 2.00 | 1.00 |")
    assert "(10.00 and 20.00 ms)" in page
