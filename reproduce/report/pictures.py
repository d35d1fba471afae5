"""The images that the page shows: the same prompts and noise under the base and every row.

For each trained run the base's image stands before the first iteration, those that training kept
(:mod:`g2rpo.training.previews`) between, and the held-out image of the evaluation at the end.
"""

import logging
from collections.abc import Sequence
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
from reproduce.report.chapter import Chapter
from reproduce.runs.folders import IMAGES, MANIFEST, damage_told, listed, read_scored
from reproduce.stages.cell_stages import held_out_prompts, picture_scores
from reproduce.tables.spec import RowSpec

logger = logging.getLogger(__name__)

SHEET = "pictures.png"
"""What rendering an experiment writes beside its tables (:mod:`reproduce.tables.picture_grid`)."""
SHEET_BYTES = 1_000_000
Scores = dict[str, dict[str, float]]
"""By prompt id, then by reward."""


@dataclass(frozen=True)
class Frame:
    """A policy's images at one moment of its training.

    Attributes:
        iteration: iterations done; 0 for the base, None where it is not known.
        images: the file of each prompt that has one, by prompt id.
        scores: of those images, as far as they were scored.
    """

    iteration: int | None
    images: dict[str, Path]
    scores: Scores


@dataclass(frozen=True)
class Tile:
    """One column of the grid: a row of the table at one seed.

    Attributes:
        row: the row.
        seed: the training seed; None where nothing was trained here.
        end: the iterations of the whole training; None where nothing was trained here.
        frames: from the base to the end, as far as there are any.
    """

    row: RowSpec
    seed: int | None
    end: int | None
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Gallery:
    """The images of a chapter, before it is decided how many fit.

    Attributes:
        prompts: those that have an image, in order.
        tiles: rows in order, then seeds.
        notes: what there is not, and why.
        there: how many prompts had an image before any were left out.
        sheet: one picture with all of it, kept with the tables; only where there is no other.
    """

    prompts: tuple[Prompt, ...]
    tiles: tuple[Tile, ...]
    notes: tuple[str, ...]
    there: int = 0
    sheet: Path | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The training seeds that have images."""
        return tuple(sorted({tile.seed for tile in self.tiles if tile.seed is not None}))

    @property
    def between(self) -> tuple[int, ...]:
        """The iterations that any run has images of, without the ends."""
        found = {
            frame.iteration
            for tile in self.tiles
            for frame in tile.frames
            if frame.iteration is not None and tile.end is not None
            if 0 < frame.iteration < tile.end
        }
        return tuple(sorted(found))


def gather_pictures(chapter: Chapter) -> Gallery:
    """Finds the images of a chapter's finished cells; what is not here is told in its notes."""
    rows = {row.key: row for row in chapter.experiment.table.rows}
    tiles: list[Tile] = []
    absent = 0
    prompts: dict[str, Prompt] = {}
    for key, row in rows.items():
        for cell in (cell for cell in chapter.cells if cell.info.row == key):
            try:
                resolved = chapter.resolved(cell)
                frames, known = _frames(chapter.layout, cell, resolved)
            except UserError as error:
                logger.warning("%s", error)
                frames, known = (), []
            prompts |= {p.id: p for p in known}
            tile = Tile(row, cell.info.seed, _end(cell), frames)
            if frames:
                tiles.append(tile)
            else:
                absent += 1
    shown = {prompt for tile in tiles for frame in tile.frames for prompt in frame.images}
    ordered = tuple(prompt for name, prompt in prompts.items() if name in shown)
    gallery = Gallery(ordered, tuple(tiles), (), len(ordered))
    if not tiles:
        gallery = replace(gallery, sheet=_sheet(chapter))
    return replace(gallery, notes=tuple(_notes(gallery, absent)))


def _sheet(chapter: Chapter) -> Path | None:
    folder = chapter.layout.experiment(chapter.profile.name, chapter.name)
    path = folder / SHEET
    return path if path.is_file() and path.stat().st_size <= SHEET_BYTES else None


def _end(cell: Cell) -> int | None:
    return None if cell.info.seed is None else cell.info.checkpoint_iteration


def _frames(
    layout: Layout, cell: Cell, resolved: ResolvedCell | None
) -> tuple[tuple[Frame, ...], list[Prompt]]:
    if resolved is None:
        return (), []
    run = layout.runs / cell.info.runs.get("train", "")
    evaluation = run / "evaluations" / cell.info.runs.get("evaluation", "")
    prompts = held_out_prompts(resolved)
    read_scored(evaluation)
    frames = [_frame(_end(cell), evaluation / "images", prompts, _scores(cell.scores))]
    if resolved.train is not None:
        damaged = dict(problems(run, listed(run / MANIFEST, IMAGES)))
        for iteration in pictured_iterations(run):
            scores = picture_scores(evaluation, iteration)
            frame = _frame(iteration, pictures_folder(run, iteration), prompts, _read(scores))
            sound = {p: path for p, path in frame.images.items() if path not in damaged}
            frames.append(replace(frame, images=sound))
        base = replace(resolved, train=None, seed=None, preset=None, method="base", key="base")
        before = layout.evaluation(base)
        read_scored(before)
        known = _read(before / "scores.parquet")
        frames.append(_frame(0, before / "images", prompts, known))
    found = [frame for frame in frames if frame.images]
    found.sort(key=lambda frame: frame.iteration or 0)
    return tuple(found), prompts


def _frame(iteration: int | None, folder: Path, prompts: Sequence[Prompt], scores: Scores) -> Frame:
    paths = {prompt.id: image_path(folder, prompt) for prompt in prompts}
    images = {name: path for name, path in paths.items() if path.is_file()}
    return Frame(iteration, images, {name: scores[name] for name in images if name in scores})


def _read(path: Path) -> Scores:
    with damage_told(path):
        return _scores(pd.read_parquet(path)) if path.exists() else {}


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
            "Run folders with the held-out images are not where the report was made: this is the "
            "picture that was kept with the tables, so there is no filter and no slider."
        )
    elif not gallery.tiles:
        notes.append(
            "There is no image to show: run folders with the held-out images are not where the "
            "report was made."
        )
    elif absent:
        notes.append(f"{absent} finished runs have no images where the report was made.")
    if gallery.tiles and not gallery.between:
        notes.append(
            "These runs kept no images during training (`preview_prompts` in the profile), so the "
            "slider shows only the base and the end."
        )
    return notes


@dataclass(frozen=True)
class Amount:
    """How much of a gallery is shown.

    Attributes:
        side: longest side of an image in pixels; None leaves images as they are.
        prompts: the first so many.
        seeds: the first so many; None is all.
        between: moments between base and end; None is all.
    """

    side: int | None
    prompts: int
    seeds: int | None = None
    between: int | None = None


def reduced(gallery: Gallery, amount: Amount) -> Gallery:
    """The part of a gallery that ``amount`` allows."""
    prompts = gallery.prompts[: amount.prompts]
    seeds = gallery.seeds if amount.seeds is None else gallery.seeds[: amount.seeds]
    moments = set(_spread(gallery.between, amount.between))
    names = {prompt.id for prompt in prompts}
    tiles = []
    for tile in gallery.tiles:
        if tile.seed is not None and tile.seed not in seeds:
            continue
        kept = [f for f in tile.frames if _is_end(tile, f) or f.iteration in moments]
        frames = tuple(
            Frame(
                frame.iteration,
                {name: path for name, path in frame.images.items() if name in names},
                {name: found for name, found in frame.scores.items() if name in names},
            )
            for frame in kept
        )
        tiles.append(replace(tile, frames=frames))
    return replace(gallery, prompts=prompts, tiles=tuple(tiles))


def _is_end(tile: Tile, frame: Frame) -> bool:
    return tile.end is None or frame.iteration in (None, 0, tile.end)


def _spread(moments: Sequence[int], count: int | None) -> list[int]:
    """``count`` of ``moments``, evenly."""
    if count is None or count >= len(moments):
        return list(moments)
    return [moments[round((i + 0.5) * len(moments) / count - 0.5)] for i in range(count)]


def picture_data(
    chapter: Chapter, gallery: Gallery, names: dict[Path, str]
) -> dict[str, Any] | None:
    """A gallery as JSON, with ``names`` of the images that the page holds; None without any."""
    if not gallery.tiles or not gallery.prompts:
        return None
    columns = chapter.experiment.table.columns_for(chapter.profile.name)
    ends = {tile.end for tile in gallery.tiles if tile.end is not None}
    return {
        "prompts": [{"id": prompt.id, "text": prompt.text} for prompt in gallery.prompts],
        "there": gallery.there,
        # A run that ended sooner shows its end from there on.
        "positions": sorted({0, *gallery.between, *([max(ends)] if ends else [])}),
        "seeds": list(gallery.seeds),
        "group_label": chapter.experiment.table.group_label,
        "rewards": [{"key": c.reward, "label": c.label, "digits": c.digits} for c in columns],
        "tiles": [_tile_data(tile, names) for tile in gallery.tiles],
    }


def _tile_data(tile: Tile, names: dict[Path, str]) -> dict[str, Any]:
    return {
        "label": tile.row.label,
        "group": tile.row.group,
        "seed": tile.seed,
        "trained": list(tile.row.train),
        "end": tile.end,
        "frames": [
            {
                "at": frame.iteration,
                "images": {prompt: names[path] for prompt, path in frame.images.items()},
                "scores": {
                    prompt: {reward: round(score, 5) for reward, score in scores.items()}
                    for prompt, scores in frame.scores.items()
                },
            }
            for frame in tile.frames
        ],
    }
