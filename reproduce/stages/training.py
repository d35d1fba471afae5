"""The stages that use a trainer: training a cell's policy, and measuring its credit."""

import functools
import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g2rpo.checksums import write_document
from g2rpo.files import remove
from g2rpo.provenance import provenance
from g2rpo.training.metrics import METRICS_FILE
from reproduce.experiment import Hardware, fingerprint
from reproduce.runs.folders import (
    SETTINGS,
    read_manifest,
    read_trained,
    sound,
    write_manifest,
)
from reproduce.stages import embedding
from reproduce.stages.base import CellStage
from reproduce.stages.beginning import (
    begin_from_another,
    beginning_of,
    refuse_other_validation,
)
from slurm.graph import Needs

if TYPE_CHECKING:
    from g2rpo.training.loop import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _TrainerStage(CellStage):
    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder of its result."""

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.folder.name}"

    @property
    def lease(self) -> Path:
        return self.folder / "leases" / self.kind

    @classmethod
    def devices(cls, hardware: Hardware) -> Needs:
        return Needs(hardware.training_ranks, hardware.gpus)

    def _trainer(self) -> "Trainer":
        from g2rpo.training.loop import Trainer  # slow: a model library

        assert self.cell.train is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(self.cell.train, self.folder)
        embedding.attach(trainer.policy, self.layout)
        return trainer

    def _complete(
        self,
        trainer: "Trainer",
        result: Mapping[str, Any],
        files: Iterable[Path],
        images: Iterable[Path] = (),
    ) -> None:
        """Writes the stage's manifest with its ``result``."""
        assert self.cell.train is not None
        weights = {name: model.weights_hash for name, model in trainer.engine.rewards.items()}
        weights["policy"] = fingerprint.weights_name(self.cell.policy)
        manifest = {
            "stage": self.kind,
            "inputs": fingerprint.train_inputs(self.cell.train),
            "seed": self.cell.train.seed,
            **result,
            "provenance": provenance(weights),
        }
        write_manifest(self.folder, manifest, files, images)


@dataclass(frozen=True)
class Train(_TrainerStage):
    """Trains the policy of a cell, or resumes its training."""

    kind = "train"

    @functools.cached_property
    def folder(self) -> Path:
        return self.layout.training(self.cell)

    def is_done(self) -> bool:
        """Whether the cell needs no more training."""
        return self.cell.train is None or sound(read_trained, self.folder) is not None

    def is_recorded(self) -> bool:
        """Whether everything but the weights exists: enough for tables."""
        return self.cell.train is None or sound(read_manifest, self.folder) is not None

    def run(self) -> None:
        assert self.cell.train is not None
        for note in self.cell.train.notes():
            logger.warning("%s: %s", self.cell.key, note)
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = self.folder / SETTINGS
        refuse_other_validation(self.folder, self.cell.train)
        write_document(settings, self.cell.train.model_dump(mode="json"))
        if self.cell.profile.hardware.training_ranks == 1:  # several would copy at once
            begin_from_another(self.folder, self.cell.train)
        trainer = self._trainer()
        progress = trainer.train()
        if trainer.accelerator.is_main_process:
            images = [path for path in self.folder.glob("images/*/*.png") if keep_image(path)]
            files = [settings, self.folder / METRICS_FILE]
            result = {"progress": vars(progress), **beginning_of(self.folder)}
            self._complete(trainer, result, files, images)


@dataclass(frozen=True)
class Credit(_TrainerStage):
    """Measures the credit of a cell's rollouts, on the untrained policy."""

    kind = "credit"

    @functools.cached_property
    def folder(self) -> Path:
        return self.layout.credit(self.cell)

    def is_done(self) -> bool:
        return sound(read_manifest, self.folder) is not None

    def run(self) -> None:
        from benchmarks.evaluation.credit import measure_credit  # slow: a model library

        config = self.cell.credit
        assert config is not None and self.cell.train is not None
        trainer = self._trainer()
        measured = measure_credit(trainer, config, self.folder)
        if trainer.accelerator.is_main_process:
            credit = {"credit": config.model_dump(mode="json")}
            result = {
                "inputs": fingerprint.train_inputs(self.cell.train) | credit,
                "rollouts": [rollout.document() for rollout in measured],
            }
            self._complete(trainer, result, self.folder.glob("rollout-*.json"))


def keep_image(path: Path) -> bool:
    """Whether an image is intact; a damaged one is deleted with a warning."""
    from benchmarks.evaluation.held_out import image_problem  # slow: a model library

    problem = image_problem(path)
    if problem is not None:
        logger.warning("%s %s; deleting it", path, problem)
        remove(path)
    return problem is None
