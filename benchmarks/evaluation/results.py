"""The small, committed result of one finished cell: one row of a table at one seed.

A cell outlives its run folder: its configuration, weights and cost, and the score of every held-out
prompt under every reward model. On disk it is ``<name>.json`` with the metadata,
``<name>.parquet`` with the scores and optionally ``<name>__curve.parquet`` (learning curve) and
``<name>__metrics.parquet`` (other metrics). The JSON is written last and has the hashes of the
others, so a cell is either complete or absent.
"""

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from benchmarks.evaluation.metrics import METRIC_TYPES, checked_frame
from benchmarks.evaluation.protocol import DiversityConfig, DriftConfig
from g2rpo.checksums import parse_document, write_document
from g2rpo.config import StrictModel, unhashed, validate
from g2rpo.errors import UserError
from g2rpo.files import atomic_write_bytes, sha256_file
from g2rpo.training.checkpoint.folder import equal_cost

Key = Annotated[str, pydantic.StringConstraints(pattern=r"^[a-z0-9]+([._/-][a-z0-9]+)*$")]
"""A row's key, such as ``base`` or ``hps/g2rpo``; safe in file names."""

Name = Annotated[str, pydantic.StringConstraints(pattern=r"^[a-z0-9]+([_-][a-z0-9]+)*$")]
"""Name of a table, an experiment or a profile; safe in file names."""

SCORE_TYPES = {"prompt_id": "str", "reward": "str", "score": "float32"}
STYLE = "style"
"""Additional column of the scores if the prompt set has styles."""
PARTS = ("scores", "curve", "metrics")
"""The tables of a cell."""
AGAIN = "delete {} and rerun `g2rpo reproduce` to write it again from the run folder"


class Cost(StrictModel):
    """Cost of training up to the evaluated checkpoint; all zero for an untrained base."""

    rollout_evaluations: int = pydantic.Field(ge=0)
    """NFE of single latents during rollouts."""
    training_forwards: int = pydantic.Field(ge=0)
    training_backwards: int = pydantic.Field(ge=0)
    images_scored: int = pydantic.Field(ge=0)
    """Images decoded and scored for training, not for evaluation."""
    device_seconds: float = pydantic.Field(ge=0)
    """Wall time of training times the number of devices."""
    iterations: int = pydantic.Field(ge=0)
    device: str
    """Device name, e.g. ``NVIDIA H200`` or ``cpu``; seconds are comparable within one device."""

    @property
    def equal_cost_evaluations(self) -> int:
        """See :func:`g2rpo.training.checkpoint.folder.equal_cost`."""
        return int(equal_cost(self))


class Protocol(StrictModel):
    """The evaluation protocol of the scores: its name in tables and its hash."""

    name: str
    hash: str
    size: tuple[int, int] | None = unhashed(None)
    """Height and width in pixels of images that are not square."""
    diversity: DiversityConfig | None = None
    drift: DriftConfig | None = None

    @property
    def title(self) -> str:
        """The name, with the size of images that are not square."""
        if self.size is None:
            return self.name
        height, width = self.size
        return f"{self.name}, height {height} × width {width}"


class Provenance(StrictModel):
    """How the numbers were produced."""

    git_commit: str | None = None
    git_dirty: bool | None = None
    packages: dict[str, str]
    """Package name to version."""
    weights: dict[str, str]
    """Name of the policy or reward to the SHA-256 of its weights."""
    hardware: dict[str, str]
    checkpoint: str | None = None
    """Origin of weights trained elsewhere: a path, or a hub id with its commit."""


def cell_name(row: str, seed: int | None) -> str:
    """The name of a cell in file names; unique, since keys have neither ``--`` nor ``__``."""
    plain = row.replace("/", "--")
    return plain if seed is None else f"{plain}__seed{seed}"


class CellInfo(StrictModel):
    """Everything about a cell except its scores.

    Attributes:
        row: the table row it belongs to.
        method: the method's name, ``base``, or ``checkpoint`` for weights trained elsewhere.
        train_rewards: the rewards it was trained on; empty for the base or if unknown.
        preset: ``released`` or ``matched``; None if nothing was trained here.
        seed: the training seed; None for a base or a checkpoint without one.
        protocol: how it was sampled and scored.
        sampling: the settings behind the protocol's name, in one line; None in older cells.
        runs: stage name to the hash of its run.
        checkpoint_iteration: the evaluated iteration, 0 for the base; None if unknown.
        cost: cost of training up to that checkpoint; None if unknown.
        provenance: commit, packages, weights and hardware.
    """

    row: Key
    method: str
    train_rewards: tuple[str, ...] = ()
    preset: str | None = None
    seed: int | None = None
    protocol: Protocol
    sampling: str | None = unhashed(None)
    runs: dict[str, str]
    checkpoint_iteration: int | None = pydantic.Field(ge=0)
    cost: Cost | None
    provenance: Provenance

    @property
    def name(self) -> str:
        """Its name in file names."""
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
        info: everything but the numbers.
        scores: one row per prompt and reward: prompt_id (str), reward (str), score (float32), and
            style (str) if the prompt set has styles.
        curve: the learning curve, one row per logged iteration, or None.
        metrics: one row per metric and measured prompt: prompt_id (str), metric (str, as in
            :mod:`benchmarks.evaluation.metrics`), value (float64); or None.

    Raises:
        UserError: a score or metric is missing, duplicated or not finite; the message names it.
    """

    info: CellInfo
    scores: pd.DataFrame
    curve: pd.DataFrame | None = None
    metrics: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        where = f"cell {self.info.name}"
        object.__setattr__(self, "scores", _checked(self.scores, where))
        if self.metrics is None:
            return
        metrics = checked_frame(self.metrics, METRIC_TYPES, where)
        unknown = set(metrics["prompt_id"]) - set(self.scores["prompt_id"])
        if unknown:
            raise UserError(f"{where}: prompt {min(unknown)!r} has metrics but no scores")
        object.__setattr__(self, "metrics", metrics)

    @cached_property
    def by_reward(self) -> dict[str, npt.NDArray[np.float64]]:
        """The scores of each reward, float64, in the order of :attr:`scores`."""
        parts = self.scores.groupby("reward")["score"]
        return {str(reward): part.to_numpy(np.float64) for reward, part in parts}

    @property
    def rewards(self) -> tuple[str, ...]:
        """The reward models that scored it, sorted."""
        return tuple(sorted(self.by_reward))

    def means(self) -> dict[str, float]:
        """Mean score over the prompts of each reward, in float64."""
        scores = self.scores.astype({"score": "float64"})
        return {str(k): float(v) for k, v in scores.groupby("reward")["score"].mean().items()}


def _checked(scores: pd.DataFrame, where: str) -> pd.DataFrame:
    styled = STYLE in scores.columns and scores[STYLE].notna().any()
    kept = checked_frame(scores, SCORE_TYPES | ({STYLE: "str"} if styled else {}), where)
    if kept.empty:
        raise UserError(f"{where}: no scores")
    prompts = set(kept["prompt_id"])
    for reward, part in kept.groupby("reward"):
        missing = sorted(prompts - set(part["prompt_id"]))
        if missing:
            raise UserError(f"{where}: prompt {missing[0]!r} has no score under {reward!r}")
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
    """The folder of an experiment's cells: ``results/<profile>/<experiment>/cells``."""
    return results / profile / experiment / "cells"


def save_cell(cell: Cell, folder: Path) -> Path:
    """Writes a cell into ``folder`` and returns the path of its JSON.

    Replaces an older cell of the same name. If killed halfway, the cell is absent, not mixed.
    """
    json_path = folder / f"{cell.info.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    json_path.unlink(missing_ok=True)
    hashes = {}
    for part in PARTS:
        frame, path = getattr(cell, part), _parquet_path(json_path, part)
        if frame is None:
            path.unlink(missing_ok=True)  # an older cell's
        else:
            data = _parquet(frame)
            atomic_write_bytes(path, data)
            hashes[f"{part}_sha256"] = hashlib.sha256(data).hexdigest()
    document = _CellFile.model_validate({"cell": cell.info, **hashes})
    write_document(json_path, document.model_dump(mode="json"))
    return json_path


def _parquet_path(json_path: Path, part: str) -> Path:
    name = json_path.name.removesuffix(".json")
    return json_path.with_name(f"{name}.parquet" if part == "scores" else f"{name}__{part}.parquet")


def load_cell(json_path: Path) -> Cell:
    """Reads one cell.

    Args:
        json_path: its JSON file.

    Raises:
        UserError: a file is missing, malformed, or does not match its recorded hash.
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
            f"{json_path}: contains the cell {document.cell.name!r}; rename the file to "
            f"{document.cell.name}.json"
        )
    hashes = {part: getattr(document, f"{part}_sha256") for part in PARTS}
    return Cell(
        document.cell,
        **{
            part: _read_parquet(json_path, part, sha256)
            for part, sha256 in hashes.items()
            if sha256
        },
    )


def _read_parquet(json_path: Path, part: str, sha256: str) -> pd.DataFrame:
    path, again = _parquet_path(json_path, part), AGAIN.format(json_path.name)
    if not path.is_file():
        raise UserError(f"{path}: missing; {again}")
    if sha256_file(path) != sha256:
        raise UserError(f"{path}: does not match the hash in {json_path.name}; {again}")
    frame: pd.DataFrame = pq.read_table(path).to_pandas()
    return frame


def load_cells(folder: Path) -> list[Cell]:
    """All cells of a folder, sorted by row and seed; empty if there is no folder."""
    cells = [load_cell(path) for path in sorted(folder.glob("*.json"))]
    return sorted(cells, key=lambda cell: (cell.info.row, _seed_order(cell)))


def _seed_order(cell: Cell) -> int:
    return -1 if cell.info.seed is None else cell.info.seed


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
        """The protocol of all its cells."""
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
            for place, reward in enumerate(rewards):
                cube[place, index] = cell.by_reward[reward]
        return cube

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of every cell of the row, sorted."""
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
    """Groups cells by row and checks that the cells of a row are compatible.

    Raises:
        UserError: a row has two cells of one seed, or cells of different prompts, methods,
            training rewards, presets or evaluation protocols.
    """
    by_row: dict[str, list[Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.info.row, []).append(cell)
    return {row: _row_scores(row, members) for row, members in by_row.items()}


def _row_scores(row: str, cells: list[Cell]) -> RowScores:
    ordered = sorted(cells, key=_seed_order)
    first = ordered[0]
    prompts = tuple(sorted(first.scores["prompt_id"].unique()))
    for before, cell in pairwise(ordered):
        if cell.info.seed is None or cell.info.seed == before.info.seed:
            raise UserError(f"row {row!r}: two cells with seed {cell.info.seed}")
        for field in ("method", "train_rewards", "preset", "protocol"):
            ours, theirs = getattr(first.info, field), getattr(cell.info, field)
            if ours != theirs:
                name = field.replace("_", " ")
                raise UserError(f"row {row!r}: cells differ in their {name}: {ours} and {theirs}")
        if tuple(sorted(cell.scores["prompt_id"].unique())) != prompts:
            raise UserError(f"row {row!r}: cells were scored on different prompts")
    return RowScores(row, tuple(ordered), prompts)
