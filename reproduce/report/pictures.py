"""The images of the page: the same prompts and noise under the base and every row.

A trained run starts with the base's image, continues with those kept during training
(:mod:`g2rpo.training.previews`) and ends with the held-out image of its evaluation.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.evaluation.held_out import image_path
from benchmarks.evaluation.results import Cell
from g2rpo.checksums import problems
from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.training.previews import pictured_iterations, pictures_folder
from reproduce.experiment import ResolvedCell
from reproduce.experiment.layout import Layout
from reproduce.experiment.table import RowSpec
from reproduce.report.chapter import Chapter
from reproduce.runs.finished import read_scores
from reproduce.runs.folders import IMAGES, MANIFEST, listed, read_scored
from reproduce.stages.evaluation_files import preview_scores

logger = logging.getLogger(__name__)

SHEET = "pictures.png"
"""The image grid beside an experiment's tables (:mod:`reproduce.tables.picture_grid`)."""
SHEET_BYTES = 1_000_000
Scores = dict[str, dict[str, float]]
"""By prompt id, then by reward."""


@dataclass(frozen=True)
class Shot:
    """One image of a row, with its scores by reward.

    ``at`` is its iteration: 0 for the base, None if unknown. Without a training, ``seed`` and the
    last iteration ``end`` are None.
    """

    row: RowSpec
    seed: int | None
    at: int | None
    end: int | None
    prompt: Prompt
    path: Path
    scores: Mapping[str, float]

    @property
    def between(self) -> bool:
        """Whether it was sampled during training."""
        return self.end is not None and self.at not in (None, 0, self.end)


@dataclass(frozen=True)
class Gallery:
    """The images of a chapter, or those of them that fit on the page.

    Attributes:
        prompts: the prompts with images, in order.
        shots: the images by row, seed and iteration.
        notes: what is missing, and why.
        there: the number of prompts with images before any were omitted.
        sheet: the image grid kept with the tables, if there are no other images.
    """

    prompts: tuple[Prompt, ...]
    shots: tuple[Shot, ...]
    notes: tuple[str, ...]
    there: int = 0
    sheet: Path | None = None

    @property
    def seeds(self) -> list[int]:
        """The training seeds with images."""
        return sorted({shot.seed for shot in self.shots if shot.seed is not None})

    @property
    def between(self) -> list[int]:
        """The iterations with images in any run, without the first and last."""
        return sorted({shot.at or 0 for shot in self.shots if shot.between})


def gather_pictures(chapter: Chapter) -> Gallery:
    """Finds the images of a chapter's finished cells; the notes say what is missing."""
    shots: list[Shot] = []
    prompts: dict[str, Prompt] = {}
    absent = 0
    for row in chapter.spec.rows:
        for cell in (cell for cell in chapter.cells if cell.info.row == row.key):
            found: list[Shot] = []
            try:
                resolved = chapter.resolved(cell)
                if resolved is not None:
                    known = resolved.held_out_prompts()
                    found = _shots(chapter.layout, row, cell, resolved, known)
                    prompts |= {prompt.id: prompt for prompt in known}
            except UserError as error:
                logger.warning("%s", error)
            shots += found
            absent += not found
    shown = {shot.prompt.id for shot in shots}
    ordered = tuple(prompt for name, prompt in prompts.items() if name in shown)
    gallery = Gallery(ordered, tuple(shots), (), len(ordered), None if shots else _sheet(chapter))
    return replace(gallery, notes=tuple(_notes(gallery, absent)))


def _sheet(chapter: Chapter) -> Path | None:
    path = chapter.layout.experiment(chapter.profile.name, chapter.name) / SHEET
    return path if path.is_file() and path.stat().st_size <= SHEET_BYTES else None


def _shots(
    layout: Layout, row: RowSpec, cell: Cell, resolved: ResolvedCell, prompts: Sequence[Prompt]
) -> list[Shot]:
    """The images of a cell: the base's, those kept during training, and the held-out ones."""
    run = layout.runs / cell.info.runs.get("train", "")
    evaluation = run / "evaluations" / cell.info.runs.get("evaluation", "")
    read_scored(evaluation)
    end = None if cell.info.seed is None else cell.info.checkpoint_iteration
    moments = [(end, evaluation / "images", _scores(cell.scores))]
    if resolved.train is not None:
        changes = {"train": None, "seed": None, "preset": None, "method": "base", "key": "base"}
        base = resolved.model_copy(update=changes)
        before = layout.evaluation(base)
        read_scored(before)
        moments.append(
            (
                0,
                before / "images",
                _read_scores(before / "scores.parquet", resolved.evaluation.images),
            )
        )
        for iteration in pictured_iterations(run):
            scores = _read_scores(preview_scores(evaluation, iteration))
            moments.append((iteration, pictures_folder(run, iteration), scores))
    moments.sort(key=lambda moment: moment[0] or 0)
    damaged = dict(problems(run, listed(run / MANIFEST, IMAGES)))
    return [
        Shot(row, cell.info.seed, at, end, prompt, path, scores.get(prompt.id, {}))
        for at, folder, scores in moments
        for prompt in prompts
        if (path := image_path(folder, prompt)).is_file() and path not in damaged
    ]


def _read_scores(path: Path, images: int = 1) -> Scores:
    return _scores(read_scores(path, images)) if path.exists() else {}


def _scores(frame: pd.DataFrame) -> Scores:
    found: Scores = {}
    columns = (frame["prompt_id"], frame["reward"], frame["score"])
    for prompt, reward, score in zip(*columns, strict=True):
        found.setdefault(str(prompt), {})[str(reward)] = float(score)
    return found


def _notes(gallery: Gallery, absent: int) -> list[str]:
    notes = []
    if gallery.sheet is not None:
        notes.append(
            "The run folders with the held-out images are not available. This is the image grid "
            "kept with the tables, so there is no filter and no slider."
        )
    elif not gallery.shots:
        notes.append("No images: the run folders with the held-out images are not available.")
    elif absent:
        notes.append(f"No images of {absent} finished {'run' if absent == 1 else 'runs'}.")
    if gallery.shots and not gallery.between:
        notes.append(
            "These runs kept no images during training (set `preview_prompts` in the profile), so "
            "the slider has only the base and the last iteration."
        )
    return notes


@dataclass(frozen=True)
class Amount:
    """How much of a gallery to show.

    Attributes:
        side: longest side of an image in pixels; None keeps the original size.
        prompts: number of prompts.
        seeds: number of seeds; None for all.
        between: number of iterations between the first and last; None for all.
    """

    side: int | None
    prompts: int
    seeds: int | None = None
    between: int | None = None


def reduced(gallery: Gallery, amount: Amount) -> Gallery:
    """The part of a gallery that ``amount`` allows."""
    prompts = gallery.prompts[: amount.prompts]
    names = {prompt.id for prompt in prompts}
    seeds = {None, *gallery.seeds[: amount.seeds]}
    moments = _spread(gallery.between, amount.between)
    shots = tuple(
        shot
        for shot in gallery.shots
        if shot.prompt.id in names and shot.seed in seeds
        if not shot.between or shot.at in moments
    )
    return replace(gallery, prompts=prompts, shots=shots)


def _spread(moments: Sequence[int], count: int | None) -> list[int]:
    """``count`` evenly spaced ``moments``."""
    if count is None or count >= len(moments):
        return list(moments)
    return [moments[round((i + 0.5) * len(moments) / count - 0.5)] for i in range(count)]


def picture_data(
    chapter: Chapter, gallery: Gallery, names: Mapping[Path, str]
) -> dict[str, Any] | None:
    """A gallery as JSON, with the ``names`` of its images on the page; None without images."""
    if not gallery.shots:
        return None
    ends = [shot.end for shot in gallery.shots if shot.end is not None]
    tiles: dict[tuple[str, int | None], list[Shot]] = {}
    for shot in gallery.shots:
        tiles.setdefault((shot.row.key, shot.seed), []).append(shot)
    return {
        "prompts": [{"id": prompt.id, "text": prompt.text} for prompt in gallery.prompts],
        "there": gallery.there,
        # A shorter run keeps showing its last image.
        "positions": sorted({0, *gallery.between, *([max(ends)] if ends else [])}),
        "seeds": gallery.seeds,
        "group_label": chapter.table.group_label,
        "rewards": [
            {"key": column.name, "label": column.label, "digits": column.digits}
            for column in chapter.table.columns
        ],
        "tiles": [_tile_data(shots, names) for shots in tiles.values()],
    }


def _tile_data(shots: Sequence[Shot], names: Mapping[Path, str]) -> dict[str, Any]:
    """A row at one seed, with a frame per iteration."""
    first = shots[0]
    frames: dict[int | None, list[Shot]] = {}
    for shot in shots:
        frames.setdefault(shot.at, []).append(shot)
    return {
        "label": first.row.label,
        "group": first.row.group,
        "seed": first.seed,
        "trained": list(first.row.train),
        "end": first.end,
        "frames": [
            {
                "at": at,
                "images": {shot.prompt.id: names[shot.path] for shot in frame},
                "scores": {
                    shot.prompt.id: {name: round(score, 5) for name, score in shot.scores.items()}
                    for shot in frame
                    if shot.scores
                },
            }
            for at, frame in frames.items()
        ],
    }
