"""Samples a share of a cell's evaluation.

The policy samples the images to score and the further images of the same prompts that measure
diversity, and its drift is measured.
"""

import gc
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from benchmarks.evaluation.drift import DriftReference, base_reference, measure_drift, no_drift
from benchmarks.evaluation.held_out import image_path, sample_images
from g2rpo.checksums import FILES, checksums_of, problems, write_document
from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.files import atomic_path, remove
from g2rpo.flow.schedule import build_grid
from g2rpo.policy import Policy, load_policy
from g2rpo.policy.base import HybridSampling
from g2rpo.policy.checkpoint import find_checkpoint
from g2rpo.training.checkpoint.load import load_trained
from reproduce.experiment.fingerprint import checkpoint_run
from reproduce.runs.folders import IMAGES, MANIFEST, listed
from reproduce.stages import embedding
from reproduce.stages.evaluation_files import EvaluationStage
from reproduce.stages.training import keep_image

logger = logging.getLogger(__name__)
SAMPLING_BATCH = 64
SAMPLING_PIXELS = 2**22
"""Pixels per batch: four images of 1024x1024. The transformer's memory grows with it."""


def sample_share(stage: EvaluationStage) -> None:
    """Samples the missing images of a share; the first share also measures the drift.

    Raises:
        UserError: the cell's training is unfinished or damaged.
    """
    cell, section = stage.cell, stage.cell.evaluation.diversity
    if not stage.training.is_done():
        raise UserError(
            f"{cell.key}, seed {cell.seed}: training is unfinished or its files are damaged; run "
            "`g2rpo train` on this cell first"
        )
    whole = cell.held_out_prompts()
    prompts = stage.share.of(whole)
    compared = [] if section is None else stage.share.of(whole[: section.prompts])
    images = cell.evaluation.images
    numbers = range(images, images if section is None else section.images)
    drifts = cell.evaluation.drift is not None and stage.share.first
    files = [image_path(stage.images, p, number) for p in prompts for number in range(images)]
    files += [image_path(stage.further_images, p, number) for p in compared for number in numbers]
    files += [stage.drift] if drifts else []
    if len(set(files)) < len(files):
        raise UserError(
            f"{cell.evaluation_prompts}: prompt ids such as 'a' and 'a_1' clash, as their images "
            "would share a file; rename one"
        )
    _discard_damaged(stage, files)
    if not all(path.exists() for path in files):
        drifts = drifts and not stage.drift.exists()
        if drifts:
            _prepare_reference(stage, whole)
        policy = _trained_policy(stage)
        batch = sampling_batch(stage)
        for number in range(images):
            sample_images(policy, prompts, cell.evaluation, stage.images, batch, number)
        for number in numbers:
            sample_images(policy, compared, cell.evaluation, stage.further_images, batch, number)
        if drifts:
            _measure_drift(stage, whole, policy)
    marker = stage.sampled_document
    marker.parent.mkdir(exist_ok=True)
    write_document(marker, {FILES: checksums_of(files, marker.parent)})


def sampling_batch(stage: EvaluationStage) -> int:
    """Images, or velocities, per batch."""
    return max(1, min(SAMPLING_BATCH, SAMPLING_PIXELS // stage.cell.policy.pixels))


def _base_policy(stage: EvaluationStage) -> Policy:
    policy = load_policy(stage.cell.policy, device())
    embedding.attach(policy, stage.layout)
    policy.transformer.eval()
    return policy


def _trained_policy(stage: EvaluationStage) -> Policy:
    """The policy to evaluate: the base, a given checkpoint, or the last one (its EMA, if kept)."""
    cell, policy = stage.cell, _base_policy(stage)
    hybrid = cell.evaluation.hybrid
    if hybrid is not None and not cell.is_base:
        steps = hybrid.steps_of(cell.evaluation.grid.steps)
        policy.handover = HybridSampling(policy.with_base_transformer(), steps)
    run = stage.training.folder if cell.train is not None else None
    if cell.checkpoint is not None:
        run = checkpoint_run(cell.checkpoint)
        if run is None:
            policy.load_checkpoint(find_checkpoint(cell.checkpoint))
    if run is not None:
        load_trained(policy, run)
    return policy


def _prepare_reference(stage: EvaluationStage, prompts: Sequence[Prompt]) -> None:
    """Computes the base's drift reference if it is missing, and frees the base."""
    cell, path = stage.cell, stage.layout.drift_reference(stage.cell)
    section = cell.evaluation.drift
    if section is None or cell.is_base:
        return
    if path.exists():
        try:
            DriftReference.load(path)
            return
        except UserError as error:
            logger.warning("%s", error)
            remove(path)
    base = _base_policy(stage)
    grid = build_grid(cell.evaluation.grid, base.image_tokens)
    batch = sampling_batch(stage)
    base_reference(base, prompts, section, grid, cell.evaluation.seed, batch).save(path)
    del base
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure_drift(stage: EvaluationStage, prompts: Sequence[Prompt], policy: Policy) -> None:
    section = stage.cell.evaluation.drift
    assert section is not None
    if stage.cell.is_base:
        measured = no_drift(prompts, section)
    else:
        reference = DriftReference.load(stage.layout.drift_reference(stage.cell))
        measured = measure_drift(policy, prompts, section, reference, sampling_batch(stage))
    write_frame(measured, stage.drift)


def _discard_damaged(stage: EvaluationStage, files: Sequence[Path]) -> None:
    """Deletes damaged ``files`` of a share, with a warning.

    Files without a recorded checksum come from an interrupted run: PNG files carry their own
    checksums, other files are made again.
    """
    own = {Path(os.path.normpath(path)) for path in files}
    known: set[Path] = set()
    for document, section in ((stage.sampled_document, FILES), (stage.folder / MANIFEST, IMAGES)):
        recorded = listed(document, section)
        for path, problem in problems(document.parent, recorded):
            if path in own and path.exists():  # other shares check theirs
                logger.warning("%s %s; making it again", path, problem)
                remove(path)
        known.update(Path(os.path.normpath(document.parent / name)) for name in recorded)
    for path in sorted(own - known):
        if not path.exists():
            continue
        if path.suffix == ".png":
            keep_image(path)
        else:
            remove(path)


def device() -> str:
    """The device that models are loaded to."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Writes a table as Parquet, replacing any file."""
    remove(path)
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary, index=False)
