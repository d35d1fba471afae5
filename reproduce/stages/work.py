"""One stage of an experiment as a job runs it: read what it is, take its lease, do it, or pass.

The lease keeps a stage from being done twice at once, wherever it is started from: a job, a worker
on this machine, or the command line.
"""

import functools
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.evaluation.protocol import CreditConfig, EvaluationConfig
from g2rpo.attempts import Attempt, latest
from g2rpo.checksums import FILES, parse_document, write_document
from g2rpo.config import StrictModel, content_hash, validate
from g2rpo.errors import UserError
from g2rpo.files import writable_by_others
from g2rpo.lease import Lease
from g2rpo.policy import CheckpointConfig, PolicyConfig
from g2rpo.training.config import TrainConfig
from reproduce.experiment import Experiment, Profile, ResolvedCell
from reproduce.experiment.layout import Layout
from reproduce.runs.folders import read_manifest, sound
from reproduce.stages import embedding, finished
from reproduce.stages.shares import WHOLE, Share
from slurm.distributed import Ranks
from slurm.graph import Stage
from slurm.submission import Submission

logger = logging.getLogger(__name__)
ENTRY = "reproduce.stages.work:run_stage"


@dataclass(frozen=True)
class Work:
    """What one stage does.

    Attributes:
        kind: ``train``, ``sample`` or ``score``.
        cell: the cell it is of.
        layout: where things are.
        share: which part of the prompts, where the stage is shared.
    """

    kind: str
    cell: ResolvedCell
    layout: Layout
    share: Share = WHOLE

    @functools.cached_property
    def name(self) -> str:
        """Names what it makes: the same for the same configuration and inputs."""
        run = self.layout.training(self.cell)
        if self.kind == "train":
            return f"train/{run.name}"
        return f"{self.kind}/{run.name}/{self.layout.evaluation(self.cell).name}/{self.share}"

    @property
    def lease(self) -> Path:
        """Where its attempts are told."""
        if self.kind == "train":
            return self.layout.training(self.cell) / "leases" / "train"
        folder = self.layout.evaluation(self.cell) / "leases"
        return folder / f"{self.kind}-{self.share}"

    @property
    def label(self) -> str:
        """What people call it."""
        name = _cell_label(self.cell)
        if self.kind == "train" or self.share.count == 1:
            return name
        return f"{name}, {self.share.index + 1}/{self.share.count}"

    def done(self) -> bool:
        """Whether nothing is left to do."""
        if self.kind == "train":
            return finished.is_trained(self.cell, self.layout)
        if not finished.has_training_record(self.cell, self.layout):
            return False
        if self.kind == "sample":
            return finished.is_sampled(self.cell, self.layout, self.share)
        return finished.is_scored(self.cell, self.layout, self.share)

    def do(self) -> None:
        """Does what is left."""
        from reproduce.stages import (
            cell_stages as stages,  # imports the model libraries: seconds that plans do without
        )

        if self.kind == "train":
            stages.train(self.cell, self.layout)
        elif self.kind == "sample":
            stages.sample(self.cell, self.layout, self.share)
        else:
            stages.score_share(self.cell, self.layout, self.share)


def _cell_label(cell: ResolvedCell) -> str:
    return cell.key if cell.seed is None else f"{cell.key}, seed {cell.seed}"


@dataclass(frozen=True)
class Measurement:
    """The stage that measures the credit of a cell's rollouts.

    Attributes:
        cell: the cell it is of.
        layout: where things are.
        config: how it is measured.
    """

    cell: ResolvedCell
    layout: Layout
    config: CreditConfig
    kind = "credit"

    @functools.cached_property
    def folder(self) -> Path:
        """Where its result is."""
        return self.layout.credit(self.cell, self.config)

    @property
    def name(self) -> str:
        """Names what it makes: the same for the same configuration and inputs."""
        return f"credit/{self.folder.name}"

    @property
    def lease(self) -> Path:
        """Where its attempts are told."""
        return self.folder / "leases" / "credit"

    @property
    def label(self) -> str:
        """What people call it."""
        return _cell_label(self.cell)

    def done(self) -> bool:
        """Whether nothing is left to do."""
        return sound(read_manifest, self.folder) is not None

    def do(self) -> None:
        """Measures it."""
        from reproduce.stages import cell_stages as stages  # imports the model libraries

        stages.measure(self.cell, self.layout, self.config)


@dataclass(frozen=True)
class Embedding:
    """The stage that encodes the prompts of all cells.

    Attributes:
        cells: the cells.
        layout: where things are.
    """

    cells: tuple[ResolvedCell, ...]
    layout: Layout
    kind = "embed"

    @functools.cached_property
    def name(self) -> str:
        """Names the prompts and the encoders, whoever needs them."""
        uses = {repr(use) for cell in self.cells for use in embedding.prompt_uses(cell)}
        return f"embed/{content_hash(sorted(uses))}"

    @property
    def lease(self) -> Path:
        """Where its attempts are told."""
        return self.layout.runs / "embeddings" / "leases" / self.name.removeprefix("embed/")

    @property
    def label(self) -> str:
        """What people call it."""
        return "all prompts"

    def done(self) -> bool:
        """Whether all prompts are encoded."""
        return all(embedding.is_embedded(cell, self.layout) for cell in self.cells)

    def do(self) -> None:
        """Encodes those that are not."""
        embedding.embed(self.cells, self.layout)


def latest_attempt(lease: Path) -> Attempt | None:
    """The latest start of the work whose lease is at ``lease``; None where there was none."""
    return latest(lease.parent, lease.name)


AnyWork = Work | Measurement | Embedding


def perform(work: AnyWork, ranks: Ranks, log: Path | None = None) -> None:
    """Does ``work`` under its lease; returns at once where it is done.

    Raises:
        UserError: another process has the lease and keeps it too long, or the work fails.
        Stopped: the process was asked to stop; what is done is kept.
    """
    lease, message = None, None
    if ranks.first and not work.done():
        try:
            lease = Lease.acquire(work.lease.parent, work.lease.name, log=log)
        except UserError as error:
            message = str(error)
        if lease is not None and work.done():  # the owner that was waited for has finished it
            lease.release("done")
            lease = None
    decision = ranks.agree("run" if lease is not None else message)
    if decision is None:
        return
    if decision != "run":
        raise UserError(decision)
    with lease or nullcontext():
        work.do()


def finish(cell: ResolvedCell, layout: Layout, shares: int) -> bool:
    """Puts the scores of a cell together once all shares are scored; whether they are."""
    if finished.is_scored(cell, layout):
        return True
    parts = [Share(index, shares) for index in range(shares)]
    if not all(finished.is_scored(cell, layout, part) for part in parts):
        return False
    from reproduce.stages import cell_stages as stages

    with Lease.acquire(layout.evaluation(cell) / "leases", "finish"):
        stages.finish_scores(cell, layout, shares)
    return True


def run_stage(submission: Submission, stage: Stage, ranks: Ranks) -> None:
    """The entry point of all jobs.

    Raises:
        UserError: the stage fails.
        Stopped: the process was asked to stop.
    """
    for folder in (submission.folder, submission.jobs_folder):
        if folder.is_dir() and writable_by_others(folder):
            logger.warning(
                "%s: jobs load code from it and others can write to it; run chmod go-w", folder
            )
    os.chdir(submission.directory)
    inputs = Inputs.load(submission.folder)
    if stage.kind == "render":
        from reproduce.stages.rendering import render_stage

        place = Path(stage.lease)
        with Lease.acquire(place.parent, place.name):
            render_stage(inputs)
        return
    work = inputs.work(stage)
    perform(work, ranks)
    if isinstance(work, Work) and work.kind == "score":
        finish(work.cell, work.layout, work.share.count)


@dataclass(frozen=True)
class Inputs:
    """What the stages of a submission are made from, as it was when they were submitted.

    Attributes:
        folder: of the submission.
        experiment: the experiment.
        profile: the profile.
        layout: where things are.
    """

    folder: Path
    experiment: Experiment
    profile: Profile
    layout: Layout

    @classmethod
    def load(cls, folder: Path) -> "Inputs":
        """Reads what :meth:`save` wrote.

        Raises:
            UserError: it cannot be read by this version.
        """
        path = folder / "inputs" / "experiment.json"
        found = validate(_Document, _read(path), str(path))
        return cls(folder, found.experiment, found.profile, Layout(found.runs, found.tables))

    def save(self, cells: Iterable[ResolvedCell]) -> None:
        """Writes everything that jobs need, into the submission's folder."""
        inputs = self.folder / "inputs"
        for cell in cells:
            _write(inputs / "cells" / cell_file(cell), cell_document(cell))
        _write(
            inputs / "experiment.json",
            {
                "experiment": self.experiment.model_dump(mode="json"),
                "profile": self.profile.model_dump(mode="json"),
                "runs": str(self.layout.runs),
                "tables": str(self.layout.tables),
            },
        )

    def cells(self) -> list[ResolvedCell]:
        """All cells of the submission, by row and seed."""
        files = sorted((self.folder / "inputs" / "cells").glob("*.json"))
        cells = [cell_from(_read(path), self.profile, str(path)) for path in files]
        return sorted(cells, key=lambda cell: (cell.key, cell.seed or 0))

    def work(self, stage: Stage) -> AnyWork:
        """What ``stage`` does."""
        if stage.kind == "embed":
            return Embedding(tuple(self.cells()), self.layout)
        path = self.folder / "inputs" / "cells" / stage.payload["cell"]
        cell = cell_from(_read(path), self.profile, str(path))
        if self.experiment.credit is not None:
            return Measurement(cell, self.layout, self.experiment.credit)
        return Work(stage.kind, cell, self.layout, Share(*stage.payload["share"]))


class _Document(StrictModel):
    """What ``experiment.json`` holds."""

    experiment: Experiment
    profile: Profile
    runs: Path
    tables: Path


def _write(path: Path, value: Mapping[str, Any]) -> None:
    write_document(path, {**value, FILES: {}})


def _read(path: Path) -> dict[str, Any]:
    try:
        document = parse_document(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); submit again") from None
    document.pop(FILES, None)
    return document


def cell_file(cell: ResolvedCell) -> str:
    """The file name of a cell: keys hold neither ``--`` nor ``__``."""
    plain = cell.key.replace("/", "--")
    return f"{plain}.json" if cell.seed is None else f"{plain}__seed{cell.seed}.json"


def cell_document(cell: ResolvedCell) -> dict[str, Any]:
    """A resolved cell as JSON, without its profile."""
    return {
        "key": cell.key,
        "seed": cell.seed,
        "preset": cell.preset,
        "method": cell.method,
        "train": None if cell.train is None else cell.train.model_dump(mode="json"),
        "policy": cell.policy.model_dump(mode="json"),
        "evaluation": cell.evaluation.model_dump(mode="json"),
        "evaluation_prompts": cell.evaluation_prompts,
        "train_rewards": list(cell.train_rewards),
        "checkpoint": None if cell.checkpoint is None else cell.checkpoint.model_dump(mode="json"),
    }


def cell_from(data: Mapping[str, Any], profile: Profile, where: str) -> ResolvedCell:
    """The cell that :func:`cell_document` described.

    Raises:
        UserError: it does not fit this version.
    """
    missing = {field.name for field in fields(ResolvedCell)} - {"profile"} - set(data)
    if missing:
        raise UserError(f"{where}: lacks {', '.join(sorted(missing))}; submit again")
    train, checkpoint = data["train"], data["checkpoint"]
    return ResolvedCell(
        key=data["key"],
        seed=data["seed"],
        preset=data["preset"],
        method=data["method"],
        train=None if train is None else validate(TrainConfig, train, where),
        policy=validate(PolicyConfig, data["policy"], where),
        evaluation=validate(EvaluationConfig, data["evaluation"], where),
        evaluation_prompts=data["evaluation_prompts"],
        profile=profile,
        train_rewards=tuple(data["train_rewards"]),
        checkpoint=None if checkpoint is None else validate(CheckpointConfig, checkpoint, where),
    )
