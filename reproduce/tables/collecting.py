"""A finished cell's small result: its scores, costs and provenance, out of its run folders."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.evaluation.results import (
    Cell,
    CellInfo,
    Cost,
    Protocol,
    Provenance,
    cells_folder,
    load_cell,
    save_cell,
)
from g2rpo.errors import UserError
from g2rpo.training.metrics import read_metrics
from reproduce.experiment import ResolvedCell
from reproduce.experiment.layout import Layout, protocol_hash
from reproduce.runs.folders import damage_told, read_manifest
from reproduce.stages.cell_stages import cell_behaviour

logger = logging.getLogger(__name__)


def collected(cell: ResolvedCell, layout: Layout, experiment: str) -> Cell | None:
    """The cell's small result where it is written already, whole, and of these very runs."""
    name = cell.key.replace("/", "--") + ("" if cell.seed is None else f"__seed{cell.seed}")
    path = cells_folder(layout.tables, cell.profile.name, experiment) / f"{name}.json"
    if not path.exists():
        return None
    try:
        found = load_cell(path)
    except UserError as error:
        logger.warning("%s; it is written again", error)
        return None
    same = found.info.runs == _run_names(cell, layout)
    judged = set(found.rewards) == set(cell.profile.rewards)
    return found if same and judged else None


def _run_names(cell: ResolvedCell, layout: Layout) -> dict[str, str]:
    return {"train": layout.training(cell).name, "evaluation": layout.evaluation(cell).name}


def collect(cell: ResolvedCell, layout: Layout, experiment: str) -> Path:
    """Writes the cell's small result; returns the path of its JSON.

    Raises:
        UserError: the cell is not finished, or a file of its run is damaged.
    """
    run, evaluation = layout.training(cell), layout.evaluation(cell)
    trained = read_manifest(run) if cell.train is not None else None
    scored = read_manifest(evaluation)
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
    with damage_told(evaluation / "scores.parquet"):
        scores = pd.read_parquet(evaluation / "scores.parquet")
    curve = None
    if cell.train is not None:
        curve = pd.DataFrame(read_metrics(run / "metrics.jsonl"))
    result = Cell(info, scores, curve, cell_behaviour(cell, layout).read())
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
    progress = trained["progress"]
    # Beside the costs it holds the batch sizes that fitted.
    counters = {name: progress[name] for name in Cost.model_fields if name in progress}
    return Cost(iterations=progress["iteration"], device=device, **counters)
