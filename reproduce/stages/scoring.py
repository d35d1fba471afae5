"""Scores a share of a cell's evaluation with every reward model of the profile."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from benchmarks.evaluation.diversity import measure_diversity
from benchmarks.evaluation.held_out import (
    compared_images,
    image_path,
    image_problem,
    prune_images,
    score_images,
)
from g2rpo.checksums import FILES, checksums_of, problems, write_document
from g2rpo.data.prompts import read_prompts
from g2rpo.errors import UserError
from g2rpo.provenance import provenance
from g2rpo.rewards.base import BatchedReward
from g2rpo.rewards.image_tower import ImageTower
from g2rpo.rewards.registry import check_prompts, load_reward
from g2rpo.training.previews import pictured_iterations, pictures_folder
from reproduce.experiment import fingerprint, reward_configs
from reproduce.runs.folders import IMAGES, MANIFEST, listed, write_manifest
from reproduce.stages.evaluation_files import DIVERSITY, EvaluationStage, preview_scores
from reproduce.stages.sampling import device, write_frame

logger = logging.getLogger(__name__)


def score_share(stage: EvaluationStage) -> None:
    """Scores the sampled images of a share.

    Raises:
        UserError: an image is missing or damaged.
    """
    cell = stage.cell
    if not stage.is_sampled():
        raise UserError(
            f"{cell.key}, seed {cell.seed}: images are missing or damaged; run `g2rpo sample` on "
            "this cell first"
        )
    configs, prompts = reward_configs(cell.profile), stage.share.of(cell.held_out_prompts())
    check_prompts(configs.values(), [prompt.text for prompt in prompts])
    models = {name: load_reward(config, device()) for name, config in configs.items()}
    tower = _image_tower(stage, models)
    score_images(models, prompts, stage.images, stage.scores, cell.evaluation.images)
    files = [stage.scores]
    if stage.share.first:
        files += _score_previews(stage, models)
        files += [] if tower is None else [_measure_diversity(stage, tower)]
    weights = {name: model.weights_hash for name, model in models.items()}
    weights["policy"] = fingerprint.weights_name(cell.policy)
    origin = {}
    if cell.checkpoint is not None:
        origin["checkpoint"], weights["checkpoint"] = fingerprint.checkpoint_provenance(
            cell.checkpoint
        )
    document = stage.scored_document
    write_document(
        document,
        {
            "rewards": stage.wanted_rewards(),
            "provenance": provenance(weights) | origin,
            FILES: checksums_of(files, document.parent),
        },
    )


def _image_tower(stage: EvaluationStage, models: Mapping[str, BatchedReward]) -> ImageTower | None:
    """The reward model whose features measure diversity; None if it is not measured.

    Raises:
        UserError: the protocol's reward model has no image tower.
    """
    section = stage.cell.evaluation.diversity
    if section is None:
        return None
    model = models[section.features]
    if not isinstance(model, ImageTower):
        valid = ", ".join(key for key, one in models.items() if isinstance(one, ImageTower))
        raise UserError(
            f"evaluation.diversity.features: reward model {section.features!r} has no image tower; "
            f"valid: {valid or 'none of the profile'}"
        )
    return model


def _measure_diversity(stage: EvaluationStage, tower: ImageTower) -> Path:
    """Measures the diversity of the images of all shares; returns the file.

    Raises:
        UserError: an image, possibly of another share, is missing or damaged.
    """
    evaluation, prompts = stage.cell.evaluation, stage.cell.held_out_prompts()
    section = evaluation.diversity
    assert section is not None
    places = stage.images, stage.further_images
    files = compared_images(prompts, section, *places, evaluation.images)
    for path in (path for paths in files.values() for path in paths):
        problem = image_problem(path)
        if problem is not None:
            raise UserError(f"{path} {problem}; run `g2rpo sample` on this cell again")
    output = stage.folder / DIVERSITY
    write_frame(measure_diversity(tower, files, section.features), output)
    return output


def _score_previews(stage: EvaluationStage, models: Mapping[str, BatchedReward]) -> list[Path]:
    """Scores the preview images of training, which no table uses; returns the files.

    Damaged images are skipped.
    """
    train, run = stage.cell.train, stage.training.folder
    if train is None or train.pictures is None:
        return []
    prompts = read_prompts(Path(train.pictures.file), train.pictures.limit)
    damaged = dict(problems(run, listed(run / MANIFEST, IMAGES)))
    for path, problem in damaged.items():
        logger.warning("%s %s; skipping it", path, problem)
    outputs = []
    for iteration in pictured_iterations(run):
        folder = pictures_folder(run, iteration)
        output = preview_scores(stage.folder, iteration)
        paths = {prompt: Path(os.path.normpath(image_path(folder, prompt))) for prompt in prompts}
        intact = [p for p, path in paths.items() if path.exists() and path not in damaged]
        if intact:
            score_images(models, intact, folder, output)
            outputs.append(output)
    return outputs


def merge_scores(stage: EvaluationStage) -> None:
    """Merges the scores of all shares, then deletes all but ``keep_images`` images."""
    cell, folder, diversity = stage.cell, stage.folder, stage.cell.evaluation.diversity
    count = stage.share.count
    parts = [stage.of_share(index, count) for index in range(count)]
    first = parts[0].share_manifest()
    assert first is not None
    frames = pd.concat([pd.read_parquet(part.scores) for part in parts])
    prompts = cell.held_out_prompts()
    order = {prompt.id: place for place, prompt in enumerate(prompts)}
    by_prompt = [
        part.sort_values("prompt_id", key=lambda ids: ids.map(order), kind="stable")
        for _, part in frames.groupby("reward", sort=False)
    ]
    write_frame(pd.concat(by_prompt, ignore_index=True), folder / "scores.parquet")
    keep = cell.profile.keep_images
    if diversity is not None:
        prune_images(stage.further_images, prompts, keep, diversity.images)
    prune_images(stage.images, prompts, keep, cell.evaluation.images)
    write_manifest(
        folder,
        {
            "stage": "score",
            "inputs": fingerprint.evaluation_inputs(cell),
            "rewards": first["rewards"],
            "provenance": first["provenance"],
        },
        [*folder.glob("*.parquet"), *folder.glob("pictures/*.parquet")],
        [*stage.images.glob("*.png"), *stage.further_images.glob("*.png")],
    )
    shutil.rmtree(folder / "shares")
