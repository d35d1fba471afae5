"""What is measured of a cell's policy beside its scores: diversity of its images, drift of its
velocities. The sampling stage makes what needs the policy, the scoring stage what needs a judge.
"""

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from benchmarks.evaluation.diversity import measure_diversity
from benchmarks.evaluation.drift import DriftReference, base_reference, measure_drift, no_drift
from benchmarks.evaluation.held_out import (
    compared_images,
    image_path,
    image_problem,
    prune_images,
    sample_images,
)
from benchmarks.evaluation.protocol import EvaluationConfig
from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.files import atomic_path, remove
from g2rpo.flow.schedule import build_grid
from g2rpo.policy import FluxPolicy
from g2rpo.rewards.base import BatchedReward
from g2rpo.rewards.image_tower import ImageTower
from reproduce.stages.shares import WHOLE, Share

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Behaviour:
    """The measurements of one evaluation.

    Attributes:
        config: the protocol; its absent sections are not measured.
        prompts: all held-out prompts.
        folder: of the evaluation.
        reference: the file of the base's inputs and velocities.
        is_base: whether the policy is the base itself, whose drift is 0.
        batch: images, or velocities, at a time.
        share: whose further images are sampled; the first share measures the drift and, when all
            are there, the diversity.
    """

    config: EvaluationConfig
    prompts: Sequence[Prompt]
    folder: Path
    reference: Path
    is_base: bool
    batch: int
    share: Share = WHOLE

    @property
    def _images(self) -> Path:
        return self.folder / "diversity"

    @property
    def _drift(self) -> Path:
        return self.folder / "drift.parquet"

    @property
    def _diversity(self) -> Path:
        return self.folder / "diversity.parquet"

    @property
    def sampled_files(self) -> list[Path]:
        """What needs the policy: the share's further images, and the drift."""
        others = [image_path(self._images, *one) for one in self._other_images()]
        drift = self.config.drift is not None and self.share.first
        return [*others, self._drift] if drift else others

    @property
    def judged_files(self) -> list[Path]:
        """What :meth:`judge` writes, for the first share."""
        return [] if self.config.diversity is None else [self._diversity]

    @property
    def _drift_is_due(self) -> bool:
        return self.config.drift is not None and self.share.first and not self._drift.exists()

    def _compared(self) -> Sequence[Prompt]:
        """The share's prompts of which further images are sampled."""
        section = self.config.diversity
        return [] if section is None else self.share.of(self.prompts[: section.prompts])

    def _other_images(self) -> list[tuple[Prompt, int]]:
        section = self.config.diversity
        numbers = range(1, 1 if section is None else section.images)
        return [(prompt, number) for prompt in self._compared() for number in numbers]

    def prepare(self, load_base: Callable[[], FluxPolicy]) -> None:
        """Makes the base's reference where it is not there; the base has left memory afterwards."""
        section = self.config.drift
        if section is None or not self._drift_is_due or self.is_base:
            return
        if self.reference.exists():
            try:
                DriftReference.load(self.reference)
                return
            except UserError as error:
                logger.warning("%s", error)
                remove(self.reference)
        base = load_base()
        grid = build_grid(self.config.grid, base.image_tokens)
        seed = self.config.seed
        base_reference(base, self.prompts, section, grid, seed, self.batch).save(self.reference)
        del base
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def sample(self, policy: FluxPolicy) -> None:
        """Samples the further images of a prompt and measures the drift, where not done yet."""
        section = self.config.diversity
        if section is not None:
            for index in range(1, section.images):
                sample_images(
                    policy, self._compared(), self.config, self._images, self.batch, index
                )
        if self._drift_is_due:
            _write(self._measured_drift(policy), self._drift)

    def _measured_drift(self, policy: FluxPolicy) -> pd.DataFrame:
        section = self.config.drift
        assert section is not None
        if self.is_base:
            return no_drift(self.prompts, section)
        reference = DriftReference.load(self.reference)
        return measure_drift(policy, self.prompts, section, reference, self.batch)

    def tower(self, models: Mapping[str, BatchedReward]) -> ImageTower | None:
        """The judge whose features tell images apart; None where that is not measured.

        Raises:
            UserError: the protocol's judge has no image tower.
        """
        if self.config.diversity is None:
            return None
        name = self.config.diversity.features
        model = models[name]
        if not isinstance(model, ImageTower):
            valid = ", ".join(key for key, one in models.items() if isinstance(one, ImageTower))
            raise UserError(
                f"evaluation.diversity.features: the judge {name!r} has no image tower; "
                f"valid: {valid or 'none of the profile'}"
            )
        return model

    def judge(self, tower: ImageTower | None) -> None:
        """Measures the diversity, once all images are there.

        Raises:
            UserError: one of them, which may be of another share, is damaged.
        """
        section = self.config.diversity
        if section is None or tower is None or not self.share.first:
            return
        files = compared_images(self.prompts, section, self.folder / "images", self._images)
        for path in (path for paths in files.values() for path in paths):
            problem = image_problem(path)
            if problem is not None:
                raise UserError(f"{path} {problem}; run `g2rpo sample` on this cell again")
        _write(measure_diversity(tower, files, section.features), self._diversity)

    def prune(self, keep: int | None) -> None:
        """Deletes the further images of all but the first ``keep`` prompts."""
        if self.config.diversity is not None:
            prune_images(self._images, self.prompts, keep, self.config.diversity.images)

    def read(self) -> pd.DataFrame | None:
        """All that was measured, or None where the protocol measures nothing."""
        measured = {self._diversity: self.config.diversity, self._drift: self.config.drift}
        frames = [pd.read_parquet(path) for path, section in measured.items() if section]
        return pd.concat(frames, ignore_index=True) if frames else None


def _write(frame: pd.DataFrame, path: Path) -> None:
    remove(path)
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary, index=False)
