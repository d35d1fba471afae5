"""The small, committed result of one finished cell: one row of a table at one seed.

A cell is what remains when its run directory is gone: which configuration and weights it was,
what it cost, and the score of every held-out prompt under every reward model. On disk it is
``<name>.json`` with what is said about it, ``<name>.parquet`` with the scores and, where given,
``<name>__curve.parquet`` with the learning curve and ``<name>__metrics.parquet`` with what else was
measured. The JSON is written last and holds the hashes of the others, so a cell is either whole or
absent.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from benchmarks.evaluation.metrics import checked_metrics
from benchmarks.evaluation.protocol import DiversityConfig, DriftConfig
from g2rpo.checksums import parse_document, write_document
from g2rpo.config import StrictModel, validate
from g2rpo.errors import UserError
from g2rpo.files import atomic_write_bytes, sha256_file

Key = Annotated[str, pydantic.StringConstraints(pattern=r"^[a-z0-9]+([._/-][a-z0-9]+)*$")]
"""A row's key, such as ``base`` or ``hps/g2rpo``: it names files, so it is kept plain."""

Name = Annotated[str, pydantic.StringConstraints(pattern=r"^[a-z0-9]+([_-][a-z0-9]+)*$")]
"""Of a table, an experiment or a profile: it names files and folders."""

SCORE_COLUMNS = ("prompt_id", "reward", "score")
STYLE = "style"
"""A further column of the scores, where the prompt set has styles."""
AGAIN = "delete {} and run the same `g2rpo reproduce`, which writes it again from the run's folder"


class Cost(StrictModel):
    """What it took to train up to the evaluated checkpoint; all zero for an untrained base."""

    rollout_evaluations: int = pydantic.Field(ge=0)
    """Velocity evaluations of single latents during rollouts."""
    training_forwards: int = pydantic.Field(ge=0)
    training_backwards: int = pydantic.Field(ge=0)
    images_scored: int = pydantic.Field(ge=0)
    """Images decoded and scored for training, not for evaluation."""
    device_seconds: float = pydantic.Field(ge=0)
    """Wall time of training times the number of devices."""
    iterations: int = pydantic.Field(ge=0)
    device: str
    """The device's name, e.g. ``NVIDIA H200`` or ``cpu``: seconds compare only within one."""

    @property
    def equal_cost_evaluations(self) -> int:
        """Rollout evaluations plus three times the backwards: the measure of equal cost."""
        return self.rollout_evaluations + 3 * self.training_backwards


class Protocol(StrictModel):
    """The evaluation under which the scores were taken: a name for people, a hash for machines."""

    name: str
    hash: str
    diversity: DiversityConfig | None = None
    drift: DriftConfig | None = None


class Provenance(StrictModel):
    """Where the numbers come from."""

    git_commit: str | None = None
    git_dirty: bool | None = None
    packages: dict[str, str]
    """Package name to version."""
    weights: dict[str, str]
    """Name of the policy or reward to the SHA-256 of its weights."""
    hardware: dict[str, str]
    checkpoint: str | None = None
    """Where weights that were trained elsewhere came from: a path, or a hub id with its commit."""


def cell_name(row: str, seed: int | None) -> str:
    """The name of a cell in files: unique, since keys hold neither ``--`` nor ``__``."""
    plain = row.replace("/", "--")
    return plain if seed is None else f"{plain}__seed{seed}"


class CellInfo(StrictModel):
    """Everything about a cell except its scores.

    Attributes:
        row: the table row it belongs to.
        method: the method's name, ``base``, or ``checkpoint`` for weights trained elsewhere.
        train_rewards: the rewards it was trained on, empty for the base or where not stated.
        preset: ``released`` or ``matched``, or None where nothing was trained here.
        seed: the training seed, or None for a base or a checkpoint that has none.
        protocol: how it was sampled and scored.
        runs: stage name to the hash of its run.
        checkpoint_iteration: the iteration evaluated, 0 for the base; None where not known.
        cost: what training up to that checkpoint took; None where not known.
        provenance: commit, packages, weights and hardware.
    """

    row: Key
    method: str
    train_rewards: tuple[str, ...] = ()
    preset: str | None = None
    seed: int | None = None
    protocol: Protocol
    runs: dict[str, str]
    checkpoint_iteration: int | None = pydantic.Field(ge=0)
    cost: Cost | None
    provenance: Provenance

    @property
    def name(self) -> str:
        """Its name in files."""
        return cell_name(self.row, self.seed)


class _CellFile(StrictModel):
    """The JSON document of a cell."""

    format: Literal[1] = 1
    cell: CellInfo
    scores_sha256: str
    curve_sha256: str | None = None
    metrics_sha256: str | None = None


@dataclass(frozen=True, eq=False)
class Cell:
    """One finished cell.

    Attributes:
        info: what it is.
        scores: one row per prompt and reward: prompt_id (str), reward (str), score (float32), and
            style (str) where the prompt set has styles.
        curve: the learning curve, one row per logged iteration, or None.
        metrics: one row per metric and prompt that it was measured on: prompt_id (str), metric
            (str, as in :mod:`benchmarks.evaluation.metrics`), value (float64); or None.

    Raises:
        UserError: a score or metric is missing, doubled or not finite; the message names it.
    """

    info: CellInfo
    scores: pd.DataFrame
    curve: pd.DataFrame | None = None
    metrics: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", _checked(self.scores, self.info.name))
        if self.metrics is not None:
            prompts, where = set(self.scores["prompt_id"]), f"cell {self.info.name}"
            object.__setattr__(self, "metrics", checked_metrics(self.metrics, prompts, where))

    @property
    def rewards(self) -> tuple[str, ...]:
        """The reward models that scored it, sorted."""
        return tuple(sorted(self.scores["reward"].unique()))

    def means(self) -> dict[str, float]:
        """Mean score over the prompts of each reward, in float64."""
        scores = self.scores.astype({"score": "float64"})
        return {str(k): float(v) for k, v in scores.groupby("reward")["score"].mean().items()}


def _checked(scores: pd.DataFrame, name: str) -> pd.DataFrame:
    absent = [column for column in SCORE_COLUMNS if column not in scores.columns]
    if absent:
        raise UserError(f"cell {name}: the scores have no column {absent[0]!r}")
    if scores.empty:
        raise UserError(f"cell {name}: there is not one score")
    types = {"prompt_id": "str", "reward": "str", "score": "float32"}
    if STYLE in scores.columns and scores[STYLE].notna().any():
        types[STYLE] = "str"
    kept = scores.loc[:, list(types)].astype(types)
    kept = kept.sort_values(["reward", "prompt_id"], ignore_index=True)
    bad = kept.loc[~np.isfinite(kept["score"])]
    if not bad.empty:
        first = bad.iloc[0]
        raise UserError(
            f"cell {name}: the score of prompt {first['prompt_id']!r} under {first['reward']!r} "
            "is not finite"
        )
    double = kept.loc[kept.duplicated(["prompt_id", "reward"])]
    if not double.empty:
        first = double.iloc[0]
        raise UserError(
            f"cell {name}: prompt {first['prompt_id']!r} has two scores under {first['reward']!r}"
        )
    prompts = set(kept["prompt_id"])
    for reward, part in kept.groupby("reward"):
        gone = sorted(prompts - set(part["prompt_id"]))
        if gone:
            raise UserError(f"cell {name}: prompt {gone[0]!r} has no score under {reward!r}")
    return kept


def _parquet(frame: pd.DataFrame) -> bytes:
    """Compact Parquet: dictionary strings, split float bytes, zstd, no pandas metadata."""
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    texts = [f.name for f in table.schema if not pa.types.is_primitive(f.type)]
    floats = [f.name for f in table.schema if pa.types.is_floating(f.type)]
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        compression_level=19,
        use_dictionary=texts,
        use_byte_stream_split=floats,
    )
    return buffer.getvalue()


def cells_folder(results: Path, profile: str, experiment: str) -> Path:
    """Where the cells of an experiment are kept: ``results/<profile>/<experiment>/cells``."""
    return results / profile / experiment / "cells"


def save_cell(cell: Cell, folder: Path) -> Path:
    """Writes a cell into ``folder`` and returns the path of its JSON.

    An older cell of the same name is replaced; killed in between, it is absent, not mixed.
    """
    json_path = folder / f"{cell.info.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    json_path.unlink(missing_ok=True)
    document = _CellFile(
        cell=cell.info,
        scores_sha256=_save_parquet(cell.scores, _parquet_path(json_path)),
        curve_sha256=_save_optional(cell.curve, _parquet_path(json_path, "curve")),
        metrics_sha256=_save_optional(cell.metrics, _parquet_path(json_path, "metrics")),
    )
    write_document(json_path, document.model_dump(mode="json"))
    return json_path


def _save_optional(frame: pd.DataFrame | None, path: Path) -> str | None:
    """Writes ``frame``; without one the file of an older cell is not left either."""
    if frame is None:
        path.unlink(missing_ok=True)
        return None
    return _save_parquet(frame, path)


def _save_parquet(frame: pd.DataFrame, path: Path) -> str:
    """Writes ``frame`` and returns its file's hash."""
    data = _parquet(frame)
    atomic_write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def _parquet_path(json_path: Path, part: str | None = None) -> Path:
    name = json_path.name.removesuffix(".json")
    return json_path.parent / (f"{name}__{part}.parquet" if part else f"{name}.parquet")


def load_cell(json_path: Path) -> Cell:
    """Reads one cell.

    Args:
        json_path: its JSON file.

    Raises:
        UserError: a file is missing, malformed, or not the one the JSON was written for.
    """
    try:
        data = json_path.read_bytes()
    except OSError as error:
        raise UserError(f"{json_path}: cannot be read ({error.strerror})") from None
    try:
        raw = parse_document(data)
    except ValueError as error:
        raise UserError(f"{json_path}: not a cell ({error}); {AGAIN.format('it')}") from None
    try:
        document = validate(_CellFile, raw, str(json_path))
    except UserError as error:
        raise UserError(f"{error}; or {AGAIN.format('it')}") from None
    if document.cell.name != json_path.name.removesuffix(".json"):
        raise UserError(
            f"{json_path}: holds the cell {document.cell.name!r}; rename the file to "
            f"{document.cell.name}.json"
        )
    scores = _read_parquet(json_path, None, document.scores_sha256)
    curve = _read_optional(json_path, "curve", document.curve_sha256)
    metrics = _read_optional(json_path, "metrics", document.metrics_sha256)
    return Cell(document.cell, scores, curve, metrics)


def _read_optional(json_path: Path, part: str, sha256: str | None) -> pd.DataFrame | None:
    return None if sha256 is None else _read_parquet(json_path, part, sha256)


def _read_parquet(json_path: Path, part: str | None, sha256: str) -> pd.DataFrame:
    path, again = _parquet_path(json_path, part), AGAIN.format(json_path.name)
    if not path.is_file():
        raise UserError(f"{path}: missing, though its cell's JSON names it; {again}")
    if sha256_file(path) != sha256:
        raise UserError(f"{path}: not the file that its cell's JSON was written for; {again}")
    frame: pd.DataFrame = pq.read_table(path).to_pandas()
    return frame


def load_cells(folder: Path) -> list[Cell]:
    """All cells of a folder in the order of their rows and seeds; none when there is no folder."""
    cells = [load_cell(path) for path in sorted(folder.glob("*.json"))]
    return sorted(
        cells, key=lambda cell: (cell.info.row, -1 if cell.info.seed is None else cell.info.seed)
    )


@dataclass(frozen=True, eq=False)
class RowScores:
    """The cells of one table row side by side.

    Attributes:
        row: the row's key.
        cells: sorted by seed.
        prompt_ids: sorted; the same for every cell of the row.
    """

    row: str
    cells: tuple[Cell, ...]
    prompt_ids: tuple[str, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The training seeds; empty for a base that has none."""
        return tuple(cell.info.seed for cell in self.cells if cell.info.seed is not None)

    @property
    def protocol(self) -> Protocol:
        """The evaluation of all its cells."""
        return self.cells[0].info.protocol

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards that scored every cell of the row, sorted."""
        return tuple(sorted(set.intersection(*(set(cell.rewards) for cell in self.cells))))

    def scores(
        self, rewards: Sequence[str], seeds: Sequence[int] | None = None
    ) -> npt.NDArray[np.float64]:
        """Scores as [rewards, cells, prompts], float64; all cells, or those of ``seeds``."""
        chosen = [c for c in self.cells if seeds is None or c.info.seed in seeds]
        cube = np.empty((len(rewards), len(chosen), len(self.prompt_ids)))
        for index, cell in enumerate(chosen):
            by_reward = dict(list(cell.scores.groupby("reward")))
            for place, reward in enumerate(rewards):
                cube[place, index] = by_reward[reward]["score"].to_numpy(np.float64)
        return cube

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that were measured of every cell of the row, sorted."""
        measured = [set() if c.metrics is None else set(c.metrics["metric"]) for c in self.cells]
        return tuple(sorted(set.intersection(*measured)))

    def metric(
        self, metric: str, seeds: Sequence[int] | None = None
    ) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
        """A metric as [1, cells, prompts], float64, and the ids of the prompts measured.

        Raises:
            UserError: the cells were measured on different prompts.
        """
        parts = [
            cell.metrics.loc[cell.metrics["metric"] == metric]
            for cell in self.cells
            if cell.metrics is not None and (seeds is None or cell.info.seed in seeds)
        ]
        prompts = {tuple(part["prompt_id"]) for part in parts}
        if len(prompts) != 1:
            raise UserError(f"row {self.row!r}: {metric!r} was measured on different prompts")
        values = [part["value"].to_numpy(np.float64) for part in parts]
        return np.stack(values)[None], prompts.pop()


def gather_rows(cells: Iterable[Cell]) -> dict[str, RowScores]:
    """Groups cells by row and checks that the cells of a row belong together.

    Raises:
        UserError: a row has two cells of one seed, or cells of different prompts, methods,
            training rewards, presets or evaluation protocols.
    """
    by_row: dict[str, list[Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.info.row, []).append(cell)
    return {row: _row_scores(row, members) for row, members in by_row.items()}


def _row_scores(row: str, cells: list[Cell]) -> RowScores:
    ordered = sorted(cells, key=lambda c: -1 if c.info.seed is None else c.info.seed)
    first = ordered[0]
    prompts = tuple(sorted(first.scores["prompt_id"].unique()))
    for before, cell in pairwise(ordered):
        if cell.info.seed is None or cell.info.seed == before.info.seed:
            raise UserError(f"row {row!r}: two cells with the seed {cell.info.seed}")
        for field in ("method", "train_rewards", "preset", "protocol"):
            ours, theirs = getattr(first.info, field), getattr(cell.info, field)
            if ours != theirs:
                words = re.sub("_", " ", field)
                raise UserError(
                    f"row {row!r}: its cells differ in their {words}: {ours} and {theirs}"
                )
        if tuple(sorted(cell.scores["prompt_id"].unique())) != prompts:
            raise UserError(f"row {row!r}: its cells were scored on different prompts")
    return RowScores(row, tuple(ordered), prompts)
