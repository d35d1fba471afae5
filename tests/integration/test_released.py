"""Weights trained elsewhere: sampled, scored and shown in a table."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from command_line import g2rpo_here, small_profile_data, write_small_profile
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.evaluation.results import Cell, load_cells
from g2rpo.data.prompts import read_prompts
from g2rpo.errors import UserError
from g2rpo.files import sha256_file
from g2rpo.flow.schedule import build_grid
from g2rpo.policy import Policy, PolicyConfig, load_policy
from g2rpo.policy.base import HybridSampling
from g2rpo.sampling import sample_ode
from reproduce.experiment import expand, load_experiment, load_profile
from reproduce.experiment.layout import Layout
from reproduce.stages.base import perform
from reproduce.stages.render import Render
from slurm.distributed import Ranks

NAME = "diffusion_pytorch_model.safetensors"
HYBRID = {"name": "hybrid", "hybrid": {"tuned_fraction": 0.5}}


def moved(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {
        key: tensor + 0.2 * tensor.std().nan_to_num() * torch.randn(tensor.shape, generator=draws)
        for key, tensor in state.items()
    }


@pytest.fixture(scope="module")
def workplace(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of tuned weights in two layouts, an experiment on them, and the tiny profile."""
    place = tmp_path_factory.mktemp("released")
    rewards = small_profile_data(smoke_assets)["rewards"]
    rewards = {name: rewards[name] for name in ("hps", "clip")}
    write_small_profile(place / "small.yaml", smoke_assets, rewards=rewards)
    transformer = smoke_assets / "policy" / "transformer"
    folder = place / "weights" / "checkpoint-300-0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((transformer / "config.json").read_bytes())
    base = load_file(transformer / NAME)
    save_file(moved(base, 1), folder / NAME)
    save_file(moved(base, 2), place / "single.safetensors")
    save_file({"wrong": torch.zeros(1)}, place / "wrong.safetensors")
    single = {"source": "single.safetensors"}
    cells: dict[str, Any] = {
        "base": {},
        "ode/folder": {
            "checkpoint": {"source": "weights", "subfolder": "checkpoint-300-0"},
            "train": ["hps"],
        },
        "ode/single": {"checkpoint": single},
        "ode/wrong": {"checkpoint": {"source": "wrong.safetensors"}},
        "ode/absent": {"checkpoint": {"source": "nobody/no-such-weights"}},
        "hybrid/single": {"checkpoint": single, "evaluation": HYBRID},
    }
    for key, cell in cells.items():
        cell |= {"label": key, "group": "Hybrid" if "hybrid" in key else "ODE"}
    table = {"title": "Mine", "columns": ["hps", "clip"], "focus": ["ode/single"]}
    mine = {"name": "mine", "cells": cells, "table": table}
    (place / "mine.yaml").write_text(yaml.safe_dump(mine, sort_keys=False))
    return place


@pytest.fixture(scope="module")
def finished(workplace: Path) -> dict[str, Cell]:
    profile, experiment = (
        load(str(workplace / name))
        for load, name in ((load_profile, "small.yaml"), (load_experiment, "mine.yaml"))
    )
    for row in experiment.cells:
        code = g2rpo_here(workplace, "score", "mine.yaml", row, "--profile", "small.yaml")
        assert code == (2 if row in ("ode/wrong", "ode/absent") else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        layout = Layout(Path("results/runs"), Path("results/runs"))
        cells = tuple(expand(experiment, profile, (1,)))
        perform(Render(layout, experiment, profile, cells), Ranks())
    folder = workplace / "results" / "runs" / "smoke" / "mine" / "cells"
    return {cell.info.row: cell for cell in load_cells(folder)}


def policy_with(workplace: Path, weights: Path | None) -> Policy:
    profile = yaml.safe_load((workplace / "small.yaml").read_text())
    policy = load_policy(PolicyConfig.model_validate(profile["policy"]), "cpu")
    if weights is not None:
        policy.transformer.load_state_dict(load_file(weights))
    return policy


def images_of(workplace: Path, cell: Cell) -> dict[str, np.ndarray[Any, Any]]:
    run_folder = workplace / "results" / "runs" / cell.info.runs["train"]
    folder = run_folder / "evaluations" / cell.info.runs["evaluation"] / "images"
    return {path.stem: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}


@pytest.mark.parametrize(
    ("row", "weights", "tuned_steps"),
    [
        ("base", None, None),
        ("ode/folder", f"weights/checkpoint-300-0/{NAME}", None),
        ("ode/single", "single.safetensors", None),
        ("hybrid/single", "single.safetensors", 2),
    ],
)
def test_the_image_of_a_row_is_what_its_weights_sample(
    workplace: Path,
    finished: dict[str, Cell],
    row: str,
    weights: str | None,
    tuned_steps: int | None,
) -> None:
    profile = load_profile(str(workplace / "small.yaml"))
    policy = policy_with(workplace, None if weights is None else workplace / weights)
    if tuned_steps is not None:
        policy.handover = HybridSampling(policy_with(workplace, None), tuned_steps)
    prompts = read_prompts(Path(profile.prompts.test), profile.evaluation.limit)
    grid = build_grid(profile.evaluation.grid, policy.image_tokens)
    expected = sample_ode(policy, prompts, grid, profile.evaluation.seed)
    found = images_of(workplace, finished[row])
    assert len(found) == 4
    for prompt, pixels in zip(prompts, expected.numpy(), strict=True):
        if prompt.id in found:
            np.testing.assert_array_equal(found[prompt.id], pixels)


def test_every_row_has_images_of_its_own(workplace: Path, finished: dict[str, Cell]) -> None:
    assert list(finished) == ["base", "hybrid/single", "ode/folder", "ode/single"]
    first = [
        next(iter(images_of(workplace, cell).values())).astype(int) for cell in finished.values()
    ]
    for i, one in enumerate(first):
        for other in first[:i]:
            assert np.abs(one - other).max() > 10


def test_a_checkpoint_has_no_seed_and_no_known_cost(
    workplace: Path, finished: dict[str, Cell]
) -> None:
    info = finished["ode/single"].info
    assert (info.seed, info.preset, info.method) == (None, None, "checkpoint")
    assert (info.cost, info.checkpoint_iteration) == (None, None)
    assert info.provenance.checkpoint == "single.safetensors"
    assert info.provenance.weights["checkpoint"] == sha256_file(workplace / "single.safetensors")
    assert info.provenance.weights.keys() >= {"policy", "hps", "clip"}
    assert finished["ode/folder"].info.train_rewards == ("hps",)
    base = finished["base"].info
    assert base.cost is not None and base.cost.rollout_evaluations == 0
    assert base.provenance.checkpoint is None
    assert finished["hybrid/single"].info.runs["train"] == info.runs["train"]
    assert finished["hybrid/single"].info.protocol != info.protocol == base.protocol


def test_the_table_shows_dashes_sources_and_gaps(
    workplace: Path, finished: dict[str, Cell]
) -> None:
    output = workplace / "results" / "runs" / "smoke" / "mine"
    text = (output / "mine.md").read_text()
    lines = {
        cells[2]: cells
        for cells in ([part.strip() for part in line.split("|")] for line in text.splitlines())
        if len(cells) > 4
    }
    assert lines["base"][-6:-1] == ["0"] * 5
    assert lines["ode/folder"][-6:-1] == ["–"] * 5
    assert "†" in lines["ode/folder"][3] and "†" not in lines["ode/single"][3]
    assert "not the weights of this model" in text and "nobody/no-such-weights" in text
    assert "weights from single.safetensors, not trained here" in text
    table = pd.read_csv(output / "mine.csv").set_index("row")
    assert (
        table.loc["ode/folder", "rollout_evaluations"] != table.loc["base", "rollout_evaluations"]
    )
    assert np.isnan(table.loc["ode/folder", "device_seconds"])
    reading = (output / "mine_reading.md").read_text()
    assert "Cost against it" not in reading
    assert (output / "pictures.png").stat().st_size > 0


def test_a_second_time_nothing_is_sampled_and_other_weights_are(
    workplace: Path,
    finished: dict[str, Cell],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("ode/single", "--profile", "small.yaml")
    assert g2rpo_here(workplace, "sample", "mine.yaml", *arguments) == 0
    first = capsys.readouterr().out.strip()
    assert finished["ode/single"].info.runs["train"] in first
    experiment = yaml.safe_load((workplace / "mine.yaml").read_text())
    save_file(
        moved(load_file(workplace / "single.safetensors"), 5), workplace / "other.safetensors"
    )
    experiment["cells"]["ode/single"]["checkpoint"]["source"] = "other.safetensors"
    (workplace / "other.yaml").write_text(yaml.safe_dump(experiment))
    assert g2rpo_here(workplace, "sample", "other.yaml", *arguments) == 0
    second = capsys.readouterr().out.strip()
    assert first != second
    assert len(list((workplace / second).glob("*.png"))) == 8


def test_the_published_weights_are_named_as_their_pages_name_them() -> None:
    experiment = load_experiment("released")
    places = {
        cell.checkpoint.source for cell in experiment.cells.values() if cell.checkpoint is not None
    }
    assert places == {
        "yujieouo/G2RPO",
        "tulvgengenr/MixGRPO",
        "xzyhku/flux_hpsv2.1_dancegrpo",
    }
    assert not experiment.trains
    assert all(
        c.checkpoint is None or c.checkpoint.revision is None for c in experiment.cells.values()
    )


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        pytest.param(
            "flux",
            "error: profile flux needs a GPU of 80 GB",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ("mini", "error: released needs the policy black-forest-labs/FLUX.1-dev"),
    ],
)
def test_the_published_weights_need_a_gpu_and_their_base(
    profile: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM either
    assert g2rpo_here(tmp_path, "reproduce", "released", "--profile", profile) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(message) and "\n" not in line


def test_a_cell_is_trained_or_loaded(tmp_path: Path, workplace: Path) -> None:
    data = yaml.safe_load((workplace / "mine.yaml").read_text())
    data["cells"]["ode/single"]["method"] = "g2rpo"
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match=r"trained \(method\) or loaded \(checkpoint\), not both"):
        load_experiment(str(path))
