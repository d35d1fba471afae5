"""Images that are not square, from the profile to the table."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from command_line import g2rpo_here, told_here, write_small_profile
from PIL import Image

from benchmarks.evaluation.results import load_cells

SIZE = (32, 48)
EXPERIMENT = {
    "name": "wide",
    "cells": {"base": {}, "hps/dance_grpo": {"method": "dance_grpo", "train": ["hps"]}},
    "table": {"title": "Wide images"},
}


@pytest.fixture(scope="module")
def workplace(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_small_profile(folder / "small.yaml", smoke_assets, preview_prompts=2)
    for name, size in {
        "wide": {"width": 48},
        "same": {"resolution": 48, "height": 32},
    }.items():
        evaluation = size | {"name": "smoke-ode4"}
        profile = {"name": "wide", "extends": str(folder / "small.yaml"), "policy": size}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(profile | {"evaluation": evaluation}))
    (folder / "rows.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    arguments = ("reproduce", "rows.yaml", "--profile", "wide.yaml", "--jobs", "1")
    assert g2rpo_here(folder, *arguments) == 0
    return folder


def test_images_have_the_size_of_the_protocol_and_every_reward_scores_them(workplace: Path) -> None:
    runs = workplace / "results" / "runs"
    (run,) = runs.glob("dance_grpo-*")
    (base,) = runs.glob("base-*")
    for folder in (run, base):
        images = sorted(folder.glob("evaluations/*/images/*.png"))
        assert len(images) == 4
        others = sorted(folder.glob("evaluations/*/diversity/*.png"))
        previews = sorted(folder.glob("images/*/*.png"))
        assert len(others) == 2 and bool(previews) == (folder is run)
        for path in (*images, *others, *previews):
            pixels = np.asarray(Image.open(path))
            assert pixels.shape == (*SIZE, 3)
            assert pixels.std() > 1
        (scores,) = (pd.read_parquet(path) for path in folder.glob("evaluations/*/scores.parquet"))
        assert set(scores["reward"]) == {"hps", "clip", "pick_score", "image_reward", "attributes"}
        assert len(scores) == 8 * 5 and np.isfinite(scores["score"]).all()
    settings = json.loads((run / "config.json").read_text())
    for section in ("policy", "pictures"):
        assert (settings[section]["height"], settings[section]["width"]) == SIZE
        assert "resolution" not in settings[section]


def test_tables_state_height_and_width(workplace: Path) -> None:
    output = workplace / "results" / "runs" / "wide" / "wide"
    for cell in load_cells(output / "cells"):
        assert cell.info.protocol.size == SIZE
    for name in ("wide.md", "wide.tex"):
        text = (output / name).read_text().replace(r"$\times$", "×")
        assert "smoke-ode4, height 32 × width 48 (" in text


def test_the_same_size_in_other_words_runs_nothing_again(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = told_here(
        capsys, workplace, "plan", "rows.yaml", "--profile", "same.yaml", "--cells", "*"
    )
    assert (code, err) == (0, "")
    for stage in ("train", "sample", "score"):
        (line,) = (line for line in out.splitlines() if line.startswith(stage))
        jobs, done, to_do = line.split()[1:4]
        assert (jobs, to_do) == (done, "0")
