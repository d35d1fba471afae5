"""Several rewards on one scale, so that they can be averaged and compared across rewards.

The unit is the headroom: 0 is the base's mean score and 1 that of ground-truth images of the same
captions, passed through the autoencoder. Where no truth is known, differences of means are in
standard deviations of the base's scores over the prompts. Base and truth are constants here: the
intervals cover the row's own variation.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import RootModel

from benchmarks.evaluation.results import RowScores
from benchmarks.evaluation.statistics import row_intervals
from g2rpo.config import StrictModel, validate
from g2rpo.data.prompts import read_prompts
from g2rpo.errors import UserError
from g2rpo.files import sha256_file
from reproduce.experiment.table import RowSpec, TableSpec, TruthSource
from reproduce.tables.comparisons import alike
from reproduce.tables.model import Column, Number

IN_DOMAIN, OUT_OF_DOMAIN = "in_domain", "out_of_domain"
MEASURES = (IN_DOMAIN, OUT_OF_DOMAIN)
MARGIN = 0.02
"""Methods whose difference lies within this share of the headroom are equivalent."""
_HEADROOM = (
    "Headroom: 0 is the base's mean score, 1 that of ground-truth images of the same captions, "
    "passed through the autoencoder; mean over the rewards that the row was trained on (in-domain) "
    "and over the others (out-of-domain)."
)
_DEVIATIONS = (
    "In-domain and out-of-domain means are over rewards, in standard deviations of the base's "
    "scores over the prompts."
)


class TruthReward(StrictModel):
    """The truth under one reward model."""

    weights: str
    """The hash of the reward's weights."""
    mean: float
    scores: tuple[float, ...]
    """One for each caption, in the order of the file."""


class TruthSplit(StrictModel):
    """The truth of one split."""

    captions: str
    """SHA-256 of the prompt file."""
    rewards: dict[str, TruthReward]


class Truth(RootModel[dict[str, TruthSplit]]):
    """The scores of the ground-truth images by split."""


@dataclass(frozen=True, eq=False)
class Scale:
    """Maps the scores of every reward to one unit.

    Attributes:
        base: the row whose means are 0.
        rewards: the score columns.
        zeros: the base's means, [rewards].
        units: the score differences that are 1, [rewards].
        headroom: whether these lead to the truth.
    """

    base: RowScores
    rewards: tuple[str, ...]
    zeros: npt.NDArray[np.float64]
    units: npt.NDArray[np.float64]
    headroom: bool

    @property
    def note(self) -> str:
        """What the unit is."""
        return _HEADROOM if self.headroom else _DEVIATIONS

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of :data:`MEASURES`."""
        noun = "headroom" if self.headroom else "mean"
        labels = f"In-domain {noun}", f"Out-of-domain {noun}"
        return tuple(Column(name=n, label=one) for n, one in zip(MEASURES, labels, strict=True))

    def measured_rows(
        self, spec: TableSpec, results: Mapping[str, RowScores]
    ) -> dict[str, RowScores]:
        """The rows that have the measures, by key."""
        found = {
            row.key: self.measured(row, results[row.key]) for row in spec.rows if row.key in results
        }
        return {key: row for key, row in found.items() if row is not None}

    def measured(self, row: RowSpec, result: RowScores) -> RowScores | None:
        """A trained row with :data:`MEASURES`, and each reward in their unit, as its rewards.

        A measure is absent if no column belongs to it. Returns None if the row was not evaluated
        as the base was, or lacks a reward.
        """
        if not row.train or not alike(result, self.base):
            return None
        if not set(self.rewards) <= set(result.rewards):
            return None
        cube = result.scores(self.rewards) - self.zeros[:, None, None]
        cube /= self.units[:, None, None]
        inside = np.array([name in row.train for name in self.rewards])
        parts = {
            name: cube[chosen].mean(axis=0)
            for name, chosen in zip(MEASURES, (inside, ~inside), strict=True)
            if chosen.any()
        } | dict(zip(self.rewards, cube, strict=True))
        cells = []
        for place, cell in enumerate(result.cells):
            frames = [
                pd.DataFrame(
                    {"prompt_id": result.prompt_ids, "reward": name, "score": means[place]}
                )
                for name, means in parts.items()
            ]
            cells.append(replace(cell, scores=pd.concat(frames), curve=None, metrics=None))
        return RowScores(row.key, tuple(cells), result.prompt_ids)


def common_scale(
    spec: TableSpec, results: Mapping[str, RowScores]
) -> tuple[Scale | None, list[str]]:
    """The scale of a table's rewards, and why there is none or it is not the headroom.

    None for a table without a scored baseline, or if nothing asks for a scale.
    """
    base = None if spec.baseline is None else results.get(spec.baseline)
    labels = {column.reward: column.label for column in spec.columns}
    if base is None or not (spec.truth or spec.primary) or not labels.keys() <= set(base.rewards):
        return None, []
    scores = base.scores(list(labels)).mean(axis=1)
    zeros, notes = scores.mean(axis=1), list[str]()
    if spec.truth is not None:
        try:
            truth = _truth_means(spec.truth, labels, list(results.values()), base.prompt_ids)
            _refuse_flat(truth - zeros, labels, "the truth scores no higher than the base under")
            return Scale(base, tuple(labels), zeros, truth - zeros, headroom=True), notes
        except UserError as error:
            notes.append(f"Headroom is not shown: {error}.")
    if not spec.primary:
        return None, notes
    try:
        units = scores.std(axis=1, ddof=1)
        _refuse_flat(units, labels, "the base scores the same on every prompt under")
        return Scale(base, tuple(labels), zeros, units, headroom=False), notes
    except UserError as error:
        return None, [*notes, f"Primary comparisons are not shown: {error}."]


def _refuse_flat(units: npt.NDArray[np.float64], labels: Mapping[str, str], what: str) -> None:
    flat = [label for label, unit in zip(labels.values(), units, strict=True) if not unit > 0]
    if flat:
        raise UserError(f"{what} {', '.join(flat)}")


def _truth_means(
    source: TruthSource,
    labels: Mapping[str, str],
    rows: Sequence[RowScores],
    prompt_ids: Sequence[str],
) -> npt.NDArray[np.float64]:
    """The truth's mean scores on ``prompt_ids``, by reward.

    Raises:
        UserError: it was not measured on these captions, or not with the rows' reward models.
    """
    file, captions = Path(source.file), Path(source.captions)
    name = file.name
    try:
        documents = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{name} cannot be read") from None
    split = validate(Truth, documents, name).root.get(source.split)
    if split is None or not labels.keys() <= split.rewards.keys():
        raise UserError(f"{name} lacks the split {source.split} or one of the rewards")
    if split.captions != sha256_file(captions):
        raise UserError(f"{name} was measured on other captions than {captions.name}")
    weights = [cell.info.provenance.weights for row in rows for cell in row.cells]
    others = [
        label
        for reward, label in labels.items()
        if {known.get(reward) for known in weights} != {split.rewards[reward].weights}
    ]
    if others:
        raise UserError(f"{name} was measured with other weights of {', '.join(others)}")
    places = {prompt.id: place for place, prompt in enumerate(read_prompts(captions))}
    if not set(prompt_ids) <= places.keys():
        raise UserError(f"the rows were scored on other prompts than {captions.name}")
    chosen = [places[one] for one in prompt_ids]
    scores = np.array([split.rewards[reward].scores for reward in labels])
    means: npt.NDArray[np.float64] = scores[:, chosen].mean(axis=1)
    return means


def headroom_numbers(row: RowScores) -> dict[str, Number]:
    """The shares of headroom of a row that :meth:`Scale.measured` returned."""
    intervals = row_intervals(row.scores(row.rewards))
    return {n: Number(**vars(one)) for n, one in zip(row.rewards, intervals, strict=True)}
