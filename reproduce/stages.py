"""The stages of one cell: train, sample and score; or the measurement of its credit.

Each stage is complete when its manifest is there; a complete stage is not run again, an
interrupted one goes on where it was. Sampling and scoring can be shared by several jobs.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch

from benchmarks.credit import measure_credit
from benchmarks.held_out import image_path, prune_images, sample_images, score_images
from benchmarks.protocol import CreditConfig
from g2rpo.config import content_hash
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.errors import UserError
from g2rpo.files import atomic_path, atomic_write_text, write_json
from g2rpo.policy import FluxPolicy
from g2rpo.policy.checkpoint import find_checkpoint
from g2rpo.policy.flux import Handover
from g2rpo.rewards.base import BatchedReward
from g2rpo.rewards.registry import load_reward
from g2rpo.training.loop import Trainer
from g2rpo.training.pictures import pictured_iterations, pictures_folder
from g2rpo.training.trained import load_trained
from reproduce import embedding, runs
from reproduce.behaviour import Behaviour
from reproduce.experiment import ResolvedCell, judges
from reproduce.finished import (
    is_sampled,
    is_scored,
    is_trained,
    share_manifest,
    share_stem,
    wanted_rewards,
)
from reproduce.layout import Layout, evaluation_inputs
from reproduce.run_folders import write_manifest
from reproduce.shares import WHOLE, Share

logger = logging.getLogger(__name__)
SAMPLING_BATCH = 64
SAMPLING_PIXELS = 2**22
"""Pixels sampled at once: four images of 1024x1024. The transformer's memory grows with it."""


def train(cell: ResolvedCell, layout: Layout) -> Path:
    """Trains the cell's policy, or goes on with it; returns the run folder.

    Raises:
        UserError: whatever :class:`Trainer` raises.
    """
    folder = layout.training(cell)
    if cell.train is None or is_trained(cell, layout):
        return folder
    for note in cell.train.notes():
        logger.warning("%s: %s", cell.key, note)
    folder.mkdir(parents=True, exist_ok=True)
    text = cell.train.model_dump_json(indent=2)
    atomic_write_text(folder / "config.json", text + "\n")
    trainer = Trainer(cell.train, folder)
    embedding.attach(trainer.policy, layout)
    progress = trainer.train()
    weights = {name: model.weights_hash for name, model in trainer.engine.rewards.items()}
    weights["policy"] = _policy_hash(cell)
    if trainer.accelerator.is_main_process:
        manifest = {
            "stage": "train",
            "inputs": runs.train_inputs(cell.train),
            "seed": cell.train.seed,
            "progress": vars(progress),
            "provenance": runs.provenance(weights),
        }
        write_manifest(folder, manifest)
    return folder


def measure(cell: ResolvedCell, layout: Layout, config: CreditConfig) -> Path:
    """Measures the credit of the cell's rollouts on the untrained policy; returns the folder.

    Raises:
        UserError: whatever :class:`Trainer` raises.
    """
    folder = layout.credit(cell, config)
    assert cell.train is not None
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cell.train, folder)
    embedding.attach(trainer.policy, layout)
    measured = measure_credit(trainer, config, folder)
    weights = {name: model.weights_hash for name, model in trainer.engine.rewards.items()}
    weights["policy"] = _policy_hash(cell)
    if trainer.accelerator.is_main_process:
        manifest = {
            "stage": "credit",
            "inputs": runs.train_inputs(cell.train) | {"credit": config.model_dump(mode="json")},
            "seed": cell.train.seed,
            "rollouts": [rollout.document() for rollout in measured],
            "provenance": runs.provenance(weights),
        }
        write_manifest(folder, manifest)
    return folder


def _policy_hash(cell: ResolvedCell) -> str:
    fingerprint = runs.source_fingerprint(cell.policy.source, cell.policy.revision)
    return fingerprint if isinstance(fingerprint, str) else content_hash(fingerprint)


def _sampling_batch(cell: ResolvedCell) -> int:
    return max(1, min(SAMPLING_BATCH, SAMPLING_PIXELS // cell.policy.resolution**2))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _base_policy(cell: ResolvedCell, layout: Layout) -> FluxPolicy:
    policy = FluxPolicy.load(cell.policy, _device())
    embedding.attach(policy, layout)
    policy.transformer.eval()
    return policy


def _trained_policy(cell: ResolvedCell, layout: Layout) -> FluxPolicy:
    """The policy to evaluate: the base, a given checkpoint, or the last (its EMA where kept)."""
    policy = _base_policy(cell, layout)
    hybrid = cell.evaluation.hybrid
    if hybrid is not None and not cell.is_base:
        steps = hybrid.steps_of(cell.evaluation.grid.steps)
        policy.handover = Handover(policy.with_base_transformer(), steps)
    if cell.checkpoint is not None:
        policy.load_checkpoint(find_checkpoint(cell.checkpoint))
    if cell.train is not None:
        load_trained(policy, layout.training(cell))
    return policy


def held_out_prompts(cell: ResolvedCell) -> list[Prompt]:
    """The prompts that the cell is judged on."""
    return read_prompts(Path(cell.evaluation_prompts), cell.evaluation.limit)


def cell_behaviour(cell: ResolvedCell, layout: Layout, share: Share = WHOLE) -> Behaviour:
    """What is measured of a cell's policy beside its scores."""
    return Behaviour(
        cell.evaluation,
        held_out_prompts(cell),
        layout.evaluation(cell),
        layout.drift_reference(cell),
        is_base=cell.is_base,
        batch=_sampling_batch(cell),
        share=share,
    )


def are_images_there(cell: ResolvedCell, layout: Layout, share: Share = WHOLE) -> bool:
    """Whether nothing of ``share`` is left that needs the policy."""
    behaviour = cell_behaviour(cell, layout, share)
    prompts = share.of(behaviour.prompts)
    images = layout.evaluation(cell) / "images"
    return behaviour.sampled and all(image_path(images, prompt).exists() for prompt in prompts)


def sample(cell: ResolvedCell, layout: Layout, share: Share = WHOLE) -> Path:
    """Samples the held-out images of ``share``; returns the folder of the cell's evaluation.

    Raises:
        UserError: the cell has not been trained to its end.
    """
    folder = layout.evaluation(cell)
    if is_sampled(cell, layout, share):
        return folder
    if not is_trained(cell, layout):
        raise UserError(
            f"{cell.key}, seed {cell.seed}: not trained to its end; run `g2rpo train` first"
        )
    behaviour = cell_behaviour(cell, layout, share)
    behaviour.prepare(lambda: _base_policy(cell, layout))
    policy = _trained_policy(cell, layout)
    prompts = share.of(behaviour.prompts)
    sample_images(policy, prompts, cell.evaluation, folder / "images", _sampling_batch(cell))
    behaviour.sample(policy)
    return folder


def score_share(cell: ResolvedCell, layout: Layout, share: Share) -> None:
    """Scores the images of ``share``, which have been sampled, with every judge of the profile."""
    if is_scored(cell, layout, share):
        return
    folder = layout.evaluation(cell)
    behaviour = cell_behaviour(cell, layout, share)
    models = {name: load_reward(config, _device()) for name, config in judges(cell.profile).items()}
    tower = behaviour.tower(models)
    stem = share_stem(folder, share)
    prompts = share.of(behaviour.prompts)
    score_images(models, prompts, folder / "images", stem.with_suffix(".parquet"))
    behaviour.judge(tower)
    if share.index == 0:
        _score_pictures(cell, layout, models)
    weights = {name: model.weights_hash for name, model in models.items()}
    weights["policy"] = _policy_hash(cell)
    origin = {}
    if cell.checkpoint is not None:
        origin["checkpoint"], weights["checkpoint"] = runs.checkpoint_provenance(cell.checkpoint)
    write_json(
        stem.with_suffix(".json"),
        {"rewards": wanted_rewards(cell), "provenance": runs.provenance(weights) | origin},
    )


def picture_scores(evaluation: Path, iteration: int) -> Path:
    """The scores of the images that were kept after ``iteration`` iterations of training."""
    return evaluation / "pictures" / f"iteration-{iteration:06d}.parquet"


def _score_pictures(
    cell: ResolvedCell, layout: Layout, models: Mapping[str, BatchedReward]
) -> None:
    """Scores the images that training has kept, for those who look at them; no table has these."""
    if cell.train is None or cell.train.pictures is None:
        return
    run, evaluation = layout.training(cell), layout.evaluation(cell)
    pictures = cell.train.pictures
    prompts = read_prompts(Path(pictures.file), pictures.limit)
    for iteration in pictured_iterations(run):
        folder, output = pictures_folder(run, iteration), picture_scores(evaluation, iteration)
        there = [prompt for prompt in prompts if image_path(folder, prompt).exists()]
        if there and not output.exists():
            score_images(models, there, folder, output)


def finish_scores(cell: ResolvedCell, layout: Layout, shares: int) -> None:
    """Puts the scores of all shares, which are there, together.

    Afterwards only ``keep_images`` of the images are kept.
    """
    folder = layout.evaluation(cell)
    if is_scored(cell, layout):
        return
    parts = [Share(index, shares) for index in range(shares)]
    first = share_manifest(folder, parts[0])
    assert first is not None
    frames = [pd.read_parquet(share_stem(folder, part).with_suffix(".parquet")) for part in parts]
    behaviour = cell_behaviour(cell, layout)
    order = {prompt.id: place for place, prompt in enumerate(behaviour.prompts)}
    scores = pd.concat(
        [
            part.sort_values("prompt_id", key=lambda ids: ids.map(order), kind="stable")
            for _, part in pd.concat(frames).groupby("reward", sort=False)
        ],
        ignore_index=True,
    )
    with atomic_path(folder / "scores.parquet") as temporary:
        scores.to_parquet(temporary, index=False)
    behaviour.prune(cell.profile.keep_images)
    prune_images(folder / "images", behaviour.prompts, cell.profile.keep_images)
    write_manifest(
        folder,
        {
            "stage": "score",
            "inputs": evaluation_inputs(cell),
            "rewards": first["rewards"],
            "provenance": first["provenance"],
        },
    )
    shutil.rmtree(folder / "shares")
