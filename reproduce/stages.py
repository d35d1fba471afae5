"""The stages of one cell: train, sample, score, and collecting its small result.

Each stage owns a folder and is complete when its manifest is there; a complete stage is not run
again, an interrupted one goes on where it was.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.cells import (
    Cell,
    CellInfo,
    Cost,
    Protocol,
    Provenance,
    cells_folder,
    load_cell,
    save_cell,
)
from benchmarks.held_out import image_path, prune_images, sample_images, score_images
from g2rpo.config import content_hash
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.errors import UserError
from g2rpo.files import atomic_write_text
from g2rpo.policy import FluxPolicy
from g2rpo.policy.checkpoint import find_checkpoint
from g2rpo.policy.flux import Handover
from g2rpo.rewards.registry import load_reward
from g2rpo.training.checkpoints import latest_checkpoint, read_progress
from g2rpo.training.loop import Trainer
from g2rpo.training.metrics import read_metrics
from reproduce import runs
from reproduce.behaviour import Behaviour
from reproduce.experiment import ResolvedCell, judges

logger = logging.getLogger(__name__)
SAMPLING_BATCH = 64
SAMPLING_PIXELS = 2**22
"""Pixels sampled at once: four images of 1024x1024. The transformer's memory grows with it."""


@dataclass(frozen=True)
class Layout:
    """Where things are written.

    Attributes:
        runs: training runs and evaluations, by the hash of what they are made from.
        tables: ``<profile>/<experiment>/`` with cells, tables and figures.
    """

    runs: Path
    tables: Path

    def training(self, cell: ResolvedCell) -> Path:
        """The training run folder of a cell; the base and a checkpoint have one of their own."""
        if cell.checkpoint is not None:
            inputs = {
                "base": runs.policy_inputs(cell.policy)["weights"],
                "checkpoint": runs.checkpoint_inputs(cell.checkpoint),
            }
            return self.runs / f"checkpoint-{content_hash(inputs)}"
        if cell.train is None:
            return self._base(cell)
        return self.runs / runs.train_run_name(cell.train)

    def _base(self, cell: ResolvedCell) -> Path:
        inputs = runs.source_fingerprint(cell.policy.source, cell.policy.revision)
        return self.runs / f"base-{content_hash(inputs)}"

    def drift_reference(self, cell: ResolvedCell) -> Path:
        """The file of the base's inputs and velocities under the cell's protocol."""
        digest = content_hash(evaluation_inputs(cell))
        return self._base(cell) / "drift" / f"{digest}.safetensors"

    def evaluation(self, cell: ResolvedCell) -> Path:
        """The evaluation folder of a cell: inside of its training run."""
        digest = content_hash(evaluation_inputs(cell))
        return self.training(cell) / "evaluations" / f"{cell.evaluation.split}-{digest}"

    def experiment(self, cell_profile: str, experiment: str) -> Path:
        """Where an experiment's tables, figures and cells go."""
        return cells_folder(self.tables, cell_profile, experiment).parent


def evaluation_inputs(cell: ResolvedCell) -> dict[str, Any]:
    """All that determines the held-out images of a trained policy."""
    return {
        "protocol": cell.evaluation.model_dump(mode="json", exclude={"name"}),
        "policy": runs.policy_inputs(cell.policy),
        "prompts": runs.prompts_hash(Path(cell.evaluation_prompts)),
        "algorithm_version": runs.ALGORITHM_VERSION,
    }


def protocol_hash(cell: ResolvedCell) -> str:
    """Names the evaluation protocol and its prompts, whatever the policy."""
    inputs = evaluation_inputs(cell)
    return content_hash({key: inputs[key] for key in ("protocol", "prompts")})


def train(cell: ResolvedCell, layout: Layout) -> Path:
    """Trains the cell's policy, or goes on with it; returns the run folder.

    Raises:
        UserError: whatever :class:`Trainer` raises.
    """
    folder = layout.training(cell)
    if cell.train is None or runs.read_manifest(folder) is not None:
        return folder
    for note in cell.train.notes():
        logger.warning("%s: %s", cell.key, note)
    folder.mkdir(parents=True, exist_ok=True)
    text = cell.train.model_dump_json(indent=2)
    atomic_write_text(folder / "config.json", text + "\n")
    trainer = Trainer(cell.train, folder)
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
        runs.write_manifest(folder, manifest)
    return folder


def _policy_hash(cell: ResolvedCell) -> str:
    fingerprint = runs.source_fingerprint(cell.policy.source, cell.policy.revision)
    return fingerprint if isinstance(fingerprint, str) else content_hash(fingerprint)


def _sampling_batch(cell: ResolvedCell) -> int:
    return max(1, min(SAMPLING_BATCH, SAMPLING_PIXELS // cell.policy.resolution**2))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _base_policy(cell: ResolvedCell) -> FluxPolicy:
    policy = FluxPolicy.load(cell.policy, _device())
    policy.transformer.eval()
    return policy


def _trained_policy(cell: ResolvedCell, layout: Layout) -> FluxPolicy:
    """The policy to evaluate: the base, a given checkpoint, or the last (its EMA where kept)."""
    policy = _base_policy(cell)
    hybrid = cell.evaluation.hybrid
    if hybrid is not None and not cell.is_base:
        steps = hybrid.steps_of(cell.evaluation.grid.steps)
        policy.handover = Handover(policy.with_base_transformer(), steps)
    if cell.checkpoint is not None:
        policy.load_checkpoint(find_checkpoint(cell.checkpoint))
    if cell.train is not None:
        run = layout.training(cell)
        checkpoint = latest_checkpoint(run)
        if checkpoint is None:
            raise UserError(f"{run}: no checkpoint; train this cell first")
        averaged = checkpoint / "ema_transformer"
        policy.load_transformer(averaged if averaged.exists() else checkpoint / "transformer")
    return policy


def held_out_prompts(cell: ResolvedCell) -> list[Prompt]:
    """The prompts that the cell is judged on."""
    return read_prompts(Path(cell.evaluation_prompts), cell.evaluation.limit)


def _behaviour(cell: ResolvedCell, layout: Layout) -> Behaviour:
    return Behaviour(
        cell.evaluation,
        held_out_prompts(cell),
        layout.evaluation(cell),
        layout.drift_reference(cell),
        is_base=cell.is_base,
        batch=_sampling_batch(cell),
    )


def sample(cell: ResolvedCell, layout: Layout) -> Path:
    """Samples the cell's held-out images; returns the folder of its evaluation.

    Raises:
        UserError: the cell has not been trained to its end.
    """
    folder = layout.evaluation(cell)
    # Once scored, most images are deleted on purpose.
    if runs.read_manifest(folder) is None:
        _sample_missing(cell, layout)
    return folder


def _sample_missing(cell: ResolvedCell, layout: Layout) -> None:
    images = layout.evaluation(cell) / "images"
    behaviour = _behaviour(cell, layout)
    prompts = behaviour.prompts
    if behaviour.sampled and all(image_path(images, prompt).exists() for prompt in prompts):
        return
    if cell.train is not None and runs.read_manifest(layout.training(cell)) is None:
        raise UserError(
            f"{cell.key}, seed {cell.seed}: not trained to its end; run `g2rpo train` first"
        )
    behaviour.prepare(lambda: _base_policy(cell))
    policy = _trained_policy(cell, layout)
    sample_images(policy, prompts, cell.evaluation, images, _sampling_batch(cell))
    behaviour.sample(policy)


def _wanted_rewards(cell: ResolvedCell) -> dict[str, Any]:
    return {name: runs.reward_inputs(config) for name, config in judges(cell.profile).items()}


def is_scored(cell: ResolvedCell, layout: Layout) -> bool:
    """Whether every judge of the profile has scored the cell's images."""
    manifest = runs.read_manifest(layout.evaluation(cell))
    return manifest is not None and manifest["rewards"] == _wanted_rewards(cell)


def score(cell: ResolvedCell, layout: Layout) -> Path:
    """Scores the cell's images with every judge of the profile; returns the evaluation folder.

    Afterwards only ``keep_images`` of the images are kept.
    """
    folder = layout.evaluation(cell)
    if is_scored(cell, layout):
        return folder
    behaviour = _behaviour(cell, layout)
    prompts = behaviour.prompts
    _sample_missing(cell, layout)
    models = {name: load_reward(config, _device()) for name, config in judges(cell.profile).items()}
    tower = behaviour.tower(models)
    score_images(models, prompts, folder / "images", folder / "scores.parquet")
    behaviour.judge(tower)
    behaviour.prune(cell.profile.keep_images)
    prune_images(folder / "images", prompts, cell.profile.keep_images)
    weights = {name: model.weights_hash for name, model in models.items()}
    weights["policy"] = _policy_hash(cell)
    origin = {}
    if cell.checkpoint is not None:
        origin["checkpoint"], weights["checkpoint"] = runs.checkpoint_provenance(cell.checkpoint)
    runs.write_manifest(
        folder,
        {
            "stage": "score",
            "inputs": evaluation_inputs(cell),
            "rewards": _wanted_rewards(cell),
            "provenance": runs.provenance(weights) | origin,
        },
    )
    return folder


def collected(cell: ResolvedCell, layout: Layout, experiment: str) -> Cell | None:
    """The cell's small result where it is written already and of these very runs."""
    name = cell.key.replace("/", "--") + ("" if cell.seed is None else f"__seed{cell.seed}")
    path = cells_folder(layout.tables, cell.profile.name, experiment) / f"{name}.json"
    if not path.exists():
        return None
    found = load_cell(path)
    same = found.info.runs == _run_names(cell, layout)
    judged = set(found.rewards) == set(cell.profile.rewards)
    return found if same and judged else None


def _run_names(cell: ResolvedCell, layout: Layout) -> dict[str, str]:
    return {"train": layout.training(cell).name, "evaluation": layout.evaluation(cell).name}


def collect(cell: ResolvedCell, layout: Layout, experiment: str) -> Path:
    """Writes the cell's small result; returns the path of its JSON."""
    run, evaluation = layout.training(cell), layout.evaluation(cell)
    trained = runs.read_manifest(run) if cell.train is not None else None
    scored = runs.read_manifest(evaluation)
    if scored is None or (cell.train is not None and trained is None):
        raise UserError(f"{cell.key}, seed {cell.seed}: not finished; run it first")
    made_by = trained or scored
    info = CellInfo(
        row=cell.key,
        method=cell.method,
        train_rewards=cell.train_rewards if cell.train is None else tuple(cell.train.rewards),
        preset=cell.preset,
        seed=cell.seed,
        protocol=Protocol(
            name=cell.evaluation.name,
            hash=protocol_hash(cell),
            diversity=cell.evaluation.diversity,
            drift=cell.evaluation.drift,
        ),
        runs=_run_names(cell, layout),
        **_training_cost(cell, trained, made_by["provenance"]["hardware"]["device"]),
        provenance=Provenance(
            **made_by["provenance"]
            | {"weights": made_by["provenance"]["weights"] | scored["provenance"]["weights"]}
        ),
    )
    scores = pd.read_parquet(evaluation / "scores.parquet")
    curve = None
    if cell.train is not None:
        curve = pd.DataFrame(read_metrics(run / "metrics.jsonl"))
    result = Cell(info, scores, curve, _behaviour(cell, layout).read())
    folder = cells_folder(layout.tables, cell.profile.name, experiment)
    return save_cell(result, folder)


def _training_cost(
    cell: ResolvedCell, trained: Mapping[str, Any] | None, device: str
) -> dict[str, Any]:
    """The fields of a cell that say how long it was trained; unknown for a checkpoint."""
    if cell.checkpoint is not None:
        return {"checkpoint_iteration": None, "cost": None}
    cost = _cost(trained, device)
    return {"checkpoint_iteration": cost.iterations, "cost": cost}


def _cost(trained: Mapping[str, Any] | None, device: str) -> Cost:
    if trained is None:
        return Cost(
            rollout_evaluations=0,
            training_forwards=0,
            training_backwards=0,
            images_scored=0,
            device_seconds=0.0,
            iterations=0,
            device=device,
        )
    progress = dict(trained["progress"])
    return Cost(iterations=progress.pop("iteration"), device=device, **progress)


def state(cell: ResolvedCell, layout: Layout) -> str:
    """How far a cell is, in a few words."""
    if is_scored(cell, layout):
        return "done"
    run = layout.training(cell)
    if cell.train is None or runs.read_manifest(run) is not None:
        return "not scored"
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        return "not trained"
    return f"interrupted at iteration {read_progress(checkpoint).iteration}"
