"""The stages of one cell: train, sample and score; or the measurement of its credit.

Each stage writes a document with the checksums of its files last, and is done while all of that is
there and undamaged; an interrupted or damaged one resumes from what is. Sampling and scoring can be
shared by several jobs.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from benchmarks.evaluation.credit import measure_credit
from benchmarks.evaluation.held_out import (
    image_path,
    image_problem,
    prune_images,
    sample_images,
    score_images,
)
from benchmarks.evaluation.protocol import CreditConfig
from g2rpo.checksums import FILES, checksums_of, problems, write_document
from g2rpo.config import content_hash
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.errors import UserError
from g2rpo.files import atomic_path, remove
from g2rpo.policy import FluxPolicy
from g2rpo.policy.checkpoint import find_checkpoint
from g2rpo.policy.flux import HybridSampling
from g2rpo.provenance import provenance, source_fingerprint
from g2rpo.rewards.base import BatchedReward
from g2rpo.rewards.registry import load_reward
from g2rpo.training.checkpoint.load import load_trained
from g2rpo.training.loop import Trainer
from g2rpo.training.metrics import METRICS_FILE
from g2rpo.training.previews import pictured_iterations, pictures_folder
from reproduce.experiment import ResolvedCell, judges
from reproduce.experiment import fingerprint as runs
from reproduce.experiment.layout import Layout, evaluation_inputs
from reproduce.runs.folders import IMAGES, MANIFEST, SETTINGS, listed, write_manifest
from reproduce.stages import embedding
from reproduce.stages.behaviour import Behaviour
from reproduce.stages.finished import (
    is_sampled,
    is_scored,
    is_trained,
    sampled_path,
    share_manifest,
    share_stem,
    wanted_rewards,
)
from reproduce.stages.shares import WHOLE, Share

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
    write_document(folder / SETTINGS, cell.train.model_dump(mode="json"))
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
            "provenance": provenance(weights),
        }
        images = [path for path in folder.glob("images/*/*.png") if _keep_image(path)]
        write_manifest(folder, manifest, [folder / SETTINGS, folder / METRICS_FILE], images)
    return folder


def _keep_image(path: Path) -> bool:
    """Whether an image is undamaged; else it is deleted, and named in a warning."""
    problem = image_problem(path)
    if problem is not None:
        logger.warning("%s %s; it is deleted", path, problem)
        remove(path)
    return problem is None


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
            "provenance": provenance(weights),
        }
        write_manifest(folder, manifest, folder.glob("rollout-*.json"))
    return folder


def _policy_hash(cell: ResolvedCell) -> str:
    fingerprint = source_fingerprint(cell.policy.source, cell.policy.revision)
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
        policy.handover = HybridSampling(policy.with_base_transformer(), steps)
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


def _discard_damaged(folder: Path, share: Share, files: Sequence[Path]) -> None:
    """Deletes, with a warning, what is damaged of the ``files`` that ``share`` samples.

    What has no recorded checksum was written by a start that was interrupted: PNG files have
    checksums of their own, others are made again.
    """
    own = {Path(os.path.normpath(path)) for path in files}
    known: set[Path] = set()
    for document, section in ((sampled_path(folder, share), FILES), (folder / MANIFEST, IMAGES)):
        recorded = listed(document, section)
        for path, problem in problems(document.parent, recorded):
            if path in own and path.exists():  # other shares look after theirs
                logger.warning("%s %s; it is made again", path, problem)
                remove(path)
        known.update(Path(os.path.normpath(document.parent / name)) for name in recorded)
    for path in sorted(own - known):
        if not path.exists():
            continue
        if path.suffix == ".png":
            _keep_image(path)
        else:
            remove(path)


def sample(cell: ResolvedCell, layout: Layout, share: Share = WHOLE) -> Path:
    """Samples the held-out images of ``share``; returns the folder of the cell's evaluation.

    Raises:
        UserError: the cell has not been trained to its end, or what it trained is damaged.
    """
    folder = layout.evaluation(cell)
    if is_sampled(cell, layout, share):
        return folder
    if not is_trained(cell, layout):
        raise UserError(
            f"{cell.key}, seed {cell.seed}: not trained to its end, or damaged since; run "
            "`g2rpo train` on this cell first"
        )
    behaviour = cell_behaviour(cell, layout, share)
    prompts = share.of(behaviour.prompts)
    images = folder / "images"
    files = [*(image_path(images, prompt) for prompt in prompts), *behaviour.sampled_files]
    _discard_damaged(folder, share, files)
    if not all(path.exists() for path in files):
        behaviour.prepare(lambda: _base_policy(cell, layout))
        policy = _trained_policy(cell, layout)
        sample_images(policy, prompts, cell.evaluation, images, _sampling_batch(cell))
        behaviour.sample(policy)
    marker = sampled_path(folder, share)
    marker.parent.mkdir(exist_ok=True)
    write_document(marker, {FILES: checksums_of(files, marker.parent)})
    return folder


def score_share(cell: ResolvedCell, layout: Layout, share: Share) -> None:
    """Scores the images of ``share``, which have been sampled, with every judge of the profile.

    Raises:
        UserError: they have not been sampled, or one is missing or damaged.
    """
    if is_scored(cell, layout, share):
        return
    if not is_sampled(cell, layout, share):
        raise UserError(
            f"{cell.key}, seed {cell.seed}: its images are not all there and undamaged; run "
            "`g2rpo sample` on this cell first"
        )
    folder = layout.evaluation(cell)
    behaviour = cell_behaviour(cell, layout, share)
    models = {name: load_reward(config, _device()) for name, config in judges(cell.profile).items()}
    tower = behaviour.tower(models)
    stem = share_stem(folder, share)
    prompts = share.of(behaviour.prompts)
    score_images(models, prompts, folder / "images", stem.with_suffix(".parquet"))
    behaviour.judge(tower)
    files = [stem.with_suffix(".parquet")]
    if share.first:
        files += [*_score_pictures(cell, layout, models), *behaviour.judged_files]
    weights = {name: model.weights_hash for name, model in models.items()}
    weights["policy"] = _policy_hash(cell)
    origin = {}
    if cell.checkpoint is not None:
        origin["checkpoint"], weights["checkpoint"] = runs.checkpoint_provenance(cell.checkpoint)
    write_document(
        stem.with_suffix(".json"),
        {
            "rewards": wanted_rewards(cell),
            "provenance": provenance(weights) | origin,
            FILES: checksums_of(files, stem.parent),
        },
    )


def picture_scores(evaluation: Path, iteration: int) -> Path:
    """The scores of the images that were kept after ``iteration`` iterations of training."""
    return evaluation / "pictures" / f"iteration-{iteration:06d}.parquet"


def _score_pictures(
    cell: ResolvedCell, layout: Layout, models: Mapping[str, BatchedReward]
) -> list[Path]:
    """Scores the images that training has kept, for those who look at them; no table has these.

    Damaged ones are left out. Returns the files of scores.
    """
    if cell.train is None or cell.train.pictures is None:
        return []
    run, evaluation = layout.training(cell), layout.evaluation(cell)
    pictures = cell.train.pictures
    prompts = read_prompts(Path(pictures.file), pictures.limit)
    damaged = dict(problems(run, listed(run / MANIFEST, IMAGES)))
    for path, problem in damaged.items():
        logger.warning("%s %s; it is left out", path, problem)
    outputs = []
    for iteration in pictured_iterations(run):
        folder, output = pictures_folder(run, iteration), picture_scores(evaluation, iteration)
        paths = {prompt: Path(os.path.normpath(image_path(folder, prompt))) for prompt in prompts}
        there = [p for p, path in paths.items() if path.exists() and path not in damaged]
        if there:
            score_images(models, there, folder, output)
            outputs.append(output)
    return outputs


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
    remove(folder / "scores.parquet")
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
        [*folder.glob("*.parquet"), *folder.glob("pictures/*.parquet")],
        [*folder.glob("images/*.png"), *folder.glob("diversity/*.png")],
    )
    shutil.rmtree(folder / "shares")
