"""Reads runs: settings, scores, learning curve, cost and provenance.

A run trained here has a folder in ``results/runs``. Committed results only have cells; the settings
of their runs come from the experiment, if it still resolves to that run.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.evaluation.protocol import protocol_line
from benchmarks.evaluation.results import (
    STYLE,
    Cell,
    CellInfo,
    Cost,
    Protocol,
    Provenance,
    load_cell,
)
from g2rpo.config import content_hash
from g2rpo.errors import UserError
from g2rpo.training.metrics import METRICS_FILE, read_metrics
from reproduce.experiment import load_experiment, load_profile, resolve
from reproduce.experiment.fingerprint import protocol_hash, train_run_name
from reproduce.runs.folders import (
    EVALUATIONS,
    MANIFEST,
    chosen_names,
    is_run,
    name_of,
    read_manifest,
    read_settings,
    reporting_damage,
    run_folders,
)
from reproduce.settings import without_seed


@dataclass(frozen=True, eq=False)
class Run:
    """One run.

    Attributes:
        name: name of its folder.
        place: its folder, or the folder of its cells if only they exist.
        cells: its scores, one cell per evaluation protocol.
        settings: its training configuration; None for the base, or if unknown.
        rows: its metrics, one row per logged iteration.
        cost: its training cost so far; None if unknown.
        provenance: commit, packages, weights and hardware; None before anything is finished.
        finished: whether training is finished.
    """

    name: str
    place: Path
    cells: tuple[Cell, ...]
    settings: Mapping[str, Any] | None
    rows: tuple[Mapping[str, Any], ...] = ()
    cost: Cost | None = None
    provenance: Provenance | None = None
    finished: bool = True

    @property
    def seed(self) -> int | None:
        """The training seed; None if nothing was trained."""
        if self.settings is not None:
            return int(self.settings["seed"])
        return self.cells[0].info.seed if self.cells else None

    @cached_property
    def without_seed(self) -> str:
        """Identifies a run up to its seed: runs that share it are one method at several seeds.

        Without settings, runs of the same row, folder and commit share it.
        """
        if self.settings is not None:
            return content_hash(without_seed(self.settings))
        if self.cells:
            info = self.cells[0].info
            kind = (info.row, info.method, info.train_rewards, info.preset)
            return content_hash([*kind, str(self.place), info.provenance.git_commit])
        return self.name


def cell_files(results: Path) -> dict[str, list[Path]]:
    """The cell files below ``results``, by the name of their run."""
    files: dict[str, list[Path]] = {}
    for pattern in ("*/*/cells/*.json", "runs/*/*/cells/*.json"):
        for path in sorted(results.glob(pattern)):
            name = _run_of(path)
            if name is not None:
                files.setdefault(name, []).append(path)
    return files


def _run_of(path: Path) -> str | None:
    try:
        name = json.loads(path.read_text())["cell"]["runs"]["train"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(name)


def find_runs(parts: Iterable[str], results: Path) -> list[Run]:
    """Finds runs by folder, cell file or name.

    Args:
        parts: run folders, cell files (``.json``), or unique prefixes of names of runs with a
            folder or a cell; a part with ``*``, ``?`` or ``[`` selects all names that match it.
        results: the results folder.

    Raises:
        UserError: a part is unknown, ambiguous, repeated, or cannot be read.
    """
    folders = {folder.name: folder for folder in run_folders(results / "runs")}
    cells: dict[str, list[Path]] | None = None
    chosen: dict[str, Run] = {}
    for part in parts:
        given = Path(part)
        if given.is_dir() and is_run(given):
            runs = [read_run(given.resolve())]
        elif given.suffix == ".json" and given.is_file():
            path = given.resolve()
            runs = [read_cells(_run_of(path) or path.stem, [path])]
        else:
            cells = cell_files(results) if cells is None else cells
            names = chosen_names(name_of(given, results), {*folders, *cells})
            runs = [_read(name, folders.get(name), cells.get(name, [])) for name in names]
        for run in runs:
            if run.name in chosen:
                raise UserError(f"run {run.name} is given twice")
            chosen[run.name] = run
    return list(chosen.values())


def _read(name: str, folder: Path | None, cells: list[Path]) -> Run:
    if folder is not None:
        run = read_run(folder)
        if run.cells or not cells:
            return run
    return read_cells(name, cells)


# From a run's folder


def read_run(folder: Path, evaluation: Path | None = None) -> Run:
    """The run in ``folder``, finished or not.

    Args:
        folder: the run's folder.
        evaluation: the evaluation to read; None reads all scored ones.

    Raises:
        UserError: a file of the run is damaged.
    """
    settings = read_settings(folder)
    manifest = read_manifest(folder) if settings is not None else None
    rows = tuple(read_metrics(folder / METRICS_FILE))
    places = [evaluation] if evaluation is not None else sorted((folder / EVALUATIONS).glob("*"))
    scored = {at: one for at in places if (one := read_manifest(at)) is not None}
    made = {folder: manifest} if manifest is not None else scored
    provenance = next((_provenance(at, one) for at, one in made.items()), None)
    run = Run(
        name=folder.name,
        place=folder,
        cells=(),
        settings=settings,
        rows=rows,
        cost=_cost(folder, manifest, rows, provenance),
        provenance=provenance,
        finished=settings is None or manifest is not None,
    )
    cells = tuple(_cell(run, at, one) for at, one in scored.items())
    return replace(run, cells=cells)


def _provenance(place: Path, manifest: Mapping[str, Any]) -> Provenance:
    with reporting_damage(place / MANIFEST):
        return Provenance.model_validate(manifest["provenance"])


def _cost(
    folder: Path,
    manifest: Mapping[str, Any] | None,
    rows: tuple[Mapping[str, Any], ...],
    provenance: Provenance | None,
) -> Cost | None:
    """The training cost so far: zero for the base, unknown for weights trained elsewhere."""
    names = [name for name in Cost.model_fields if name not in ("iterations", "device")]
    device = "unknown" if provenance is None else provenance.hardware.get("device", "unknown")
    with reporting_damage(folder / (METRICS_FILE if manifest is None else MANIFEST)):
        counted: Mapping[str, Any] | None = rows[-1] if rows else None
        if manifest is not None:
            counted = manifest["progress"]
        elif folder.name.startswith("base-"):
            counted = {"iteration": 0}
        if counted is None:
            return None
        iterations = counted["iteration"]
        # The row before the first iteration lacks some of them.
        costs = {name: counted.get(name, 0) for name in names}
        return Cost(iterations=iterations, device=device, **costs)


def _cell(run: Run, evaluation: Path, manifest: Mapping[str, Any]) -> Cell:
    """One evaluation of a run as a cell; its row is named after its method."""
    settings, scored = run.settings, _provenance(evaluation, manifest)
    made = run.provenance or scored
    with reporting_damage(evaluation / MANIFEST):
        inputs = manifest["inputs"]
        protocol = inputs["protocol"]
        method = run.name.split("-")[0] if settings is None else settings["method"]["name"]
        info = CellInfo(
            row=method,
            method=method,
            train_rewards=() if settings is None else tuple(settings["rewards"]),
            seed=None if settings is None else settings["seed"],
            protocol=Protocol(
                name=f"{protocol['split']}, {protocol['grid']['steps']} steps",
                hash=protocol_hash(inputs),
                size=(protocol["height"], protocol["width"]) if "height" in protocol else None,
                diversity=protocol.get("diversity"),
                drift=protocol.get("drift"),
            ),
            sampling=protocol_line(inputs),
            runs={"train": run.name, "evaluation": evaluation.name},
            checkpoint_iteration=None if run.cost is None else run.cost.iterations,
            cost=run.cost,
            provenance=made.model_copy(update={"weights": made.weights | scored.weights}),
        )
    files = (evaluation / f"{name}.parquet" for name in ("diversity", "drift"))
    measured = [read_frame(path) for path in files if path.exists()]
    metrics = pd.concat(measured, ignore_index=True) if measured else None
    path = evaluation / "scores.parquet"
    scores = read_scores(path, protocol.get("images", 1))
    curve = None if settings is None else pd.DataFrame(run.rows)
    with reporting_damage(path):
        return Cell(info, scores, curve, metrics)


def read_scores(path: Path, images: int) -> pd.DataFrame:
    """The scores of an evaluation, of each prompt the mean over its ``images``.

    Raises:
        UserError: see :func:`read_frame`.
    """
    scores = read_frame(path)
    if images == 1:
        return scores
    with reporting_damage(path):
        groups = scores.astype({"score": "float64"}).groupby(["prompt_id", "reward"], sort=False)
        kept = {"score": "mean"} | ({STYLE: "first"} if STYLE in scores else {})
        return groups.agg(kept).reset_index()


def read_frame(path: Path) -> pd.DataFrame:
    """Reads a Parquet file of a run.

    Raises:
        UserError: the file is missing or damaged.
    """
    with reporting_damage(path):
        return pd.read_parquet(path)


# From cells


def read_cells(name: str, paths: list[Path]) -> Run:
    """The run called ``name``, from its cells at ``paths``.

    Raises:
        UserError: a cell is damaged.
    """
    cells: dict[str, Cell] = {}
    for path in paths:  # several tables may contain the same cell
        cell = load_cell(path)
        cells.setdefault(cell.info.protocol.hash, cell)
    first = next(iter(cells.values()))
    rows = () if first.curve is None else tuple(_plain_rows(first.curve))
    return Run(
        name=name,
        place=paths[0].resolve().parent,
        cells=tuple(cells.values()),
        settings=settings_of(first, paths[0]),
        rows=rows,
        cost=first.info.cost,
        provenance=first.info.provenance,
    )


def _plain_rows(curve: pd.DataFrame) -> list[dict[str, Any]]:
    records = curve.to_dict(orient="records")
    return [{str(k): v for k, v in row.items() if not pd.isna(v)} for row in records]


def settings_of(cell: Cell, path: Path) -> dict[str, Any] | None:
    """The training settings of a committed cell, if its experiment still resolves to that run.

    Args:
        cell: the cell.
        path: its file, ``<profile>/<experiment>/cells/<name>.json``.
    """
    if cell.info.seed is None or len(path.parts) < 4:  # not in a results folder
        return None
    profile, experiment = path.parts[-4], path.parts[-3]
    try:
        loaded = load_experiment(experiment)
        train = resolve(loaded, load_profile(profile), cell.info.row, cell.info.seed).train
        if train is None or train_run_name(train) != cell.info.runs.get("train"):
            return None
    except UserError:
        return None
    return train.model_dump(mode="json")
