"""Made-up results of a small experiment on disk, with images and hostile texts, for the report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from cell_factory import make_cell, make_metrics, make_scores
from command_line import small_profile_data
from PIL import Image

from benchmarks.evaluation.held_out import image_path
from benchmarks.evaluation.metrics import DISTANCE, DRIFT, VENDI
from benchmarks.evaluation.results import Cell, Provenance, cells_folder, save_cell
from g2rpo.data.prompts import read_prompts
from g2rpo.training.previews import pictures_folder
from reproduce.experiment import Profile, load_experiment, load_profile, resolve
from reproduce.experiment.fingerprint import evaluation_inputs, protocol_hash
from reproduce.experiment.layout import Layout
from reproduce.report.chapter import Chapter, load_chapter
from reproduce.stages.evaluation_files import preview_scores

SEEDS = (1, 2, 3)
ITERATIONS = 6
PROMPTS = (
    "a red cube </script><script>window.hacked = 1</script>",
    'an "onerror" <img src=x onerror="window.hacked = 2"> & an ampersand',
    "a blue ball \\u003c!-- --> <!-- ]]> ${window.hacked = 3} {{ 7 * 7 }}",
    "ein großes 图像 🟦 with plain words",
    "a green cone",
    "a yellow ring",
)
REWARDS = {"hps": 0.70, "clip": 0.60, "attributes": 0.80}
HOSTILE_LABEL = "Flow <b>GRPO</b>"
ROWS = {"hps/dance_grpo": 0.01, "hps/flow_grpo": 0.0, "hps/g2rpo": 0.03}
"""The rows that have results, and how much higher than the base they score."""


@dataclass(frozen=True)
class Results:
    """Where everything is.

    Attributes:
        profile: its YAML file.
        experiment: its YAML file.
        folder: of the results.
    """

    profile: Path
    experiment: Path
    folder: Path

    @property
    def layout(self) -> Layout:
        return Layout(self.folder / "runs", self.folder / "runs")

    @property
    def loaded(self) -> Profile:
        return load_profile(str(self.profile))

    def chapter(self) -> Chapter:
        return load_chapter(str(self.experiment), self.loaded, self.layout)


def _profile(folder: Path, assets: Path) -> Path:
    data = small_profile_data(assets)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    data["name"] = "made-up"
    data["rewards"] = {name: {"model": name, "source": "x"} for name in REWARDS}
    data["training"]["optimization"]["iterations"] = ITERATIONS
    data |= {"preview_prompts": 4, "preview_every": 2, "keep_images": len(PROMPTS)}
    data["prompts"]["test"] = str(prompts)
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def _experiment(folder: Path) -> Path:
    labels = {
        "hps/dance_grpo": "DanceGRPO", "hps/mix_grpo": "MixGRPO",
        "hps/flow_grpo": HOSTILE_LABEL, "hps/g2rpo": "G²RPO",
    }  # fmt: skip
    cells: dict[str, Any] = {"base": {}}
    for key, label in labels.items():
        cells[key] = {
            "label": label, "group": "HPS", "method": key.split("/")[1], "train": ["hps"],
        }  # fmt: skip
    cells["hps/g2rpo"]["set"] = {"method": {"stochastic_steps": [0, 1], "granularities": [1]}}
    table = {
        "name": "made-up", "title": "Scores of nothing & nobody", "baseline": "base",
        "focus": ["hps/g2rpo"],
        "columns": [{"reward": name, "label": name.upper()} for name in REWARDS],
    }  # fmt: skip
    path = folder / "experiment.yaml"
    path.write_text(
        yaml.safe_dump({"name": "made-up", "cells": cells, "table": table}, sort_keys=False)
    )
    return path


def _curve(seed: int, gain: float) -> pd.DataFrame:
    steps = np.arange(ITERATIONS + 1)
    draws = np.random.default_rng(seed)
    phases = {"sampling": 1.0, "scoring": 0.5, "training": 0.25}
    curve = pd.DataFrame(
        {
            "iteration": steps,
            "rollout_evaluations": steps * 1000,
            "seconds": steps * 2.0,
            "validation/hps": 0.7 + gain * steps / ITERATIONS + draws.normal(0, 0.002, len(steps)),
            "reward/hps/mean": 0.6 + draws.normal(0, 0.01, len(steps)),
            "kl": 0.0,
        }
    )
    for phase, seconds in phases.items():
        curve[f"seconds/{phase}"] = np.where(steps > 0, seconds, np.nan)
    curve.loc[0, ["reward/hps/mean", "kl"]] = np.nan
    return curve


def _paint(path: Path, *key: int) -> None:
    """A picture of its own for each key, in more than one colour."""
    pixels = np.random.default_rng(key).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(path)


def _scores(mean: float, seed: int, ids: list[str]) -> pd.DataFrame:
    means = {name: base + mean for name, base in REWARDS.items()}
    scores = make_scores(means, prompts=len(ids), seed=seed, spread=0.02)
    names = {f"p{index:03d}": name for index, name in enumerate(ids)}
    return scores.assign(prompt_id=scores["prompt_id"].map(names))


def _save(results: Results, key: str, seed: int | None, number: int) -> None:
    experiment, profile = load_experiment(str(results.experiment)), results.loaded
    resolved = resolve(experiment, profile, key, seed or 0)
    run, evaluation = (results.layout.training(resolved), results.layout.evaluation(resolved))
    prompts = resolved.held_out_prompts()
    ids = [prompt.id for prompt in prompts]
    gain = ROWS.get(key, 0.0)
    provenance = Provenance(
        git_commit=f"{number:040x}", git_dirty=number == 2, packages={"torch": "2.11"},
        weights={"policy": "ab" * 32, "hps": "cd" * 32}, hardware={"device": "cpu", "cores": "2"},
    )  # fmt: skip
    cell = make_cell(
        key, seed=seed, scores=_scores(gain, seed or 0, ids),
        train=("hps",) if seed is not None else (), provenance=provenance,
        protocol={
            "name": resolved.evaluation.name, "hash": protocol_hash(evaluation_inputs(resolved)),
            "diversity": resolved.evaluation.diversity, "drift": resolved.evaluation.drift,
        },
        runs={"train": run.name, "evaluation": evaluation.name},
        checkpoint_iteration=ITERATIONS if seed is not None else 0,
    )  # fmt: skip
    drift = 0.0 if seed is None else 0.01
    metrics = make_metrics({DISTANCE: 0.2 - gain, VENDI: 1.5, DRIFT: drift}, prompts=3, noise=0.001)
    names = {f"p{index:03d}": name for index, name in enumerate(ids)}
    metrics = metrics.assign(prompt_id=metrics["prompt_id"].map(names))
    curve = None if seed is None else _curve(seed, gain)
    folder = cells_folder(results.layout.tables, profile.name, experiment.name)
    save_cell(Cell(cell.info, cell.scores, curve, metrics), folder)
    cell.scores.to_parquet(_made(evaluation / "scores.parquet"), index=False)
    for index, prompt in enumerate(prompts):
        _paint(image_path(evaluation / "images", prompt), number, 99, index)
    if resolved.train is None or resolved.train.pictures is None:
        return
    kept = read_prompts(Path(resolved.train.pictures.file), resolved.train.pictures.limit)
    for iteration in resolved.train.pictures.iterations(ITERATIONS):
        for index, prompt in enumerate(kept):
            _paint(image_path(pictures_folder(run, iteration), prompt), number, iteration, index)
        part = cell.scores[cell.scores["prompt_id"].isin([prompt.id for prompt in kept])]
        part.to_parquet(_made(preview_scores(evaluation, iteration)), index=False)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def make_results(folder: Path, assets: Path) -> Results:
    """Three rows at three seeds, one of which lacks a seed, and a fourth that was never run."""
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(_profile(folder, assets), _experiment(folder), folder / "results")
    number = 0
    _save(results, "base", None, number)
    for key in ROWS:
        for seed in SEEDS:
            number += 1
            if (key, seed) != ("hps/flow_grpo", 3):
                _save(results, key, seed, number)
    return results
