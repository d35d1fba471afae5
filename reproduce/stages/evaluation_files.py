"""The files of a cell's evaluation, and which of them exist and are intact.

Several jobs can each sample and score a share of the prompts. Each writes a document with the
checksums of its files last. When all shares are scored, their scores are merged.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from g2rpo.checksums import FILES
from reproduce.experiment import Hardware, fingerprint, reward_configs
from reproduce.runs.folders import read_document, read_scored, sound
from reproduce.stages.base import CellStage
from reproduce.stages.inputs import Inputs
from reproduce.stages.training import Train
from slurm.graph import Needs

DIVERSITY, DRIFT = "diversity.parquet", "drift.parquet"
Element = TypeVar("Element")


@dataclass(frozen=True)
class Share:
    """Every ``count``-th prompt starting at ``index``; by default all prompts.

    Raises:
        ValueError: ``index`` is not one of 0..count-1.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"share {self.index} of {self.count}: count from 0")

    def of(self, whole: Sequence[Element]) -> Sequence[Element]:
        """This share's elements of ``whole``, in order."""
        return whole[self.index :: self.count]

    @property
    def first(self) -> bool:
        """Whether this share also does the work that is done once per cell."""
        return self.index == 0

    def __str__(self) -> str:
        return f"{self.index:03d}-of-{self.count:03d}"


WHOLE = Share()


@dataclass(frozen=True)
class EvaluationStage(CellStage):
    """A stage for one share of a cell's held-out prompts."""

    share: Share = WHOLE

    @functools.cached_property
    def folder(self) -> Path:
        """The folder of the evaluation."""
        return self.layout.evaluation(self.cell)

    @functools.cached_property
    def name(self) -> str:
        return f"{self.kind}/{self.training.folder.name}/{self.folder.name}/{self.share}"

    @property
    def label(self) -> str:
        share = self.share
        which = "" if share.count == 1 else f", {share.index + 1}/{share.count}"
        return self.cell.label + which

    @property
    def lease(self) -> Path:
        return self.folder / "leases" / f"{self.kind}-{self.share}"

    @classmethod
    def devices(cls, hardware: Hardware) -> Needs:
        return Needs(1, hardware.evaluation_devices)

    @property
    def array(self) -> str | None:
        return self.name.rpartition("/")[0] if self.share.count > 1 else None

    @property
    def payload(self) -> dict[str, Any]:
        return {**super().payload, "share": [self.share.index, self.share.count]}

    @classmethod
    def load(cls, inputs: Inputs, payload: Mapping[str, Any]) -> Self:
        return cls(inputs.layout, inputs.cell(payload["cell"]), Share(*payload["share"]))

    @property
    def training(self) -> Train:
        """The stage whose policy is evaluated."""
        return Train(self.layout, self.cell)

    @property
    def images(self) -> Path:
        """The folder of the scored images."""
        return self.folder / "images"

    @property
    def further_images(self) -> Path:
        """The folder of further images of the same prompts, to measure diversity."""
        return self.folder / "diversity"

    @property
    def drift(self) -> Path:
        """The file with the drift of the policy's velocities, measured by the first share."""
        return self.folder / DRIFT

    @property
    def sampled_document(self) -> Path:
        """The document that marks the sampling of the share complete."""
        return self.folder / "shares" / f"{self.share}-images.json"

    @property
    def scored_document(self) -> Path:
        """The document that marks the scoring of the share complete."""
        return self.folder / "shares" / f"{self.share}.json"

    @property
    def scores(self) -> Path:
        """The file with the scores of the share."""
        return self.scored_document.with_suffix(".parquet")

    def wanted_rewards(self) -> dict[str, Any]:
        """The inputs of every reward model of the profile, by its name in tables."""
        configs = reward_configs(self.cell.profile).items()
        return {name: fingerprint.reward_inputs(config) for name, config in configs}

    def of_share(self, index: int, count: int) -> "EvaluationStage":
        """The same stage for another share."""
        return replace(self, share=Share(index, count))

    def is_sampled(self) -> bool:
        """Whether the images of the share exist, or existed and have been scored."""
        # Most images are deleted once scored.
        if self.is_scored() or self.has_images():
            return True
        # They may have been sampled with another number of shares.
        names = (path.name for path in self.sampled_document.parent.glob("*-images.json"))
        matches = (re.fullmatch(r"\d+-of-0*([1-9]\d*)-images\.json", name) for name in names)
        counts = {int(match[1]) for match in matches if match}
        return any(
            all(self.of_share(index, count).has_images() for index in range(count))
            for count in counts
        )

    def has_images(self) -> bool:
        """Whether the images of exactly this share exist."""
        read = functools.partial(read_document, sections=(FILES,))
        return sound(read, self.sampled_document) is not None

    def is_merged(self) -> bool:
        """Whether every reward model of the profile has scored all images of the cell."""
        return self._is_wanted(sound(read_scored, self.folder))

    def is_scored(self) -> bool:
        """Whether every reward model of the profile has scored the images of the share."""
        # After a change of reward models, a rescored share is not merged with the others yet.
        return self.is_merged() or self._is_wanted(self.share_manifest())

    def share_manifest(self) -> dict[str, Any] | None:
        """The manifest of the share's scores; None if missing or damaged."""
        read = functools.partial(read_document, sections=("rewards", "provenance"))
        return sound(read, self.scored_document)

    def _is_wanted(self, manifest: dict[str, Any] | None) -> bool:
        # Hash the reward models last: without scores, their weights may not be here yet.
        return manifest is not None and manifest.get("rewards") == self.wanted_rewards()


def preview_scores(evaluation: Path, iteration: int) -> Path:
    """The file with the scores of the preview images of an iteration of training."""
    return evaluation / "pictures" / f"iteration-{iteration:06d}.parquet"
