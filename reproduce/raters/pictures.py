"""The images of each side of a comparison, and how they were sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks.evaluation.scoring.items import read_source, refuse_bad
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.errors import UserError
from reproduce.experiment.fingerprint import protocol_hash
from reproduce.runs.folders import (
    EVALUATIONS,
    MANIFEST,
    chosen_names,
    is_run,
    name_of,
    read_manifest,
    read_scored,
    reporting_damage,
    run_folders,
)

SCORES = "scores.parquet"


class Picture(NamedTuple):
    """One image and its prompt."""

    prompt: str
    path: Path


@dataclass(frozen=True)
class Side:
    """One side.

    Attributes:
        label: the run or folder, as written in the key.
        pictures: by prompt id.
        protocol: hash of the images' seed, grid and prompts; None if unknown.
        prompts: number of evaluated prompts; some may no longer have images.
        left_out: files that cannot be compared, each with the reason.
    """

    label: str
    pictures: dict[str, Picture]
    protocol: str | None
    prompts: int
    left_out: tuple[tuple[str, str], ...] = ()


def find_sides(
    names: Sequence[str], results: Path, prompts: Path | None, *, skip_bad: bool = False
) -> list[Side]:
    """Finds the two sides of a comparison.

    Args:
        names: two of: the beginning of a run's name, a run's folder, the folder of one of its
            evaluations, or any folder of images.
        results: where runs are found by name.
        prompts: the prompt set of image folders; it may be larger.
        skip_bad: skips images of a folder that have no prompt.

    Raises:
        UserError: there is no such run or folder, two runs do not share exactly one evaluation, or
            an image of a folder has no prompt.
    """
    found = [_evaluations(name, results) for name in names]
    if found[0] == found[1] and (found[0] or Path(names[0]).resolve() == Path(names[1]).resolve()):
        raise UserError("both sides are the same images; name another run or folder")
    if any(not places for places in found):
        return [
            _folder_side(Path(name), prompts, skip_bad)
            if not places
            else _side(_only(name, places))
            for name, places in zip(names, found, strict=True)
        ]
    shared = set(found[0]) & set(found[1])
    if not shared:
        raise UserError(
            f"{names[0]} and {names[1]} share no evaluation; score both under the same protocol"
        )
    if len(shared) > 1:
        listed = ", ".join(str(found[0][one]) for one in sorted(shared))
        raise UserError(f"several shared evaluations; name the folders of one: {listed}")
    protocol = shared.pop()
    return [_side(places[protocol]) for places in found]


def _only(name: str, places: dict[str, Path]) -> Path:
    if len(places) > 1:
        listed = ", ".join(str(place) for place in places.values())
        raise UserError(f"{name}: several evaluations; name the folder of one: {listed}")
    return next(iter(places.values()))


def _evaluations(name: str, results: Path) -> dict[str, Path]:
    """The scored evaluations that ``name`` matches, by protocol; empty for other folders."""
    given = Path(name)
    if given.is_dir() and (given / SCORES).is_file() and (given / "manifest.json").is_file():
        places = [given]
    elif given.is_dir() and not is_run(given):
        return {}
    else:
        folder = given
        if not given.is_dir():
            folders = {run.name: run for run in run_folders(results / "runs")}
            chosen = chosen_names(name_of(given, results), folders)
            if len(chosen) > 1:
                raise UserError(f"{name!r} matches {len(chosen)} runs; name one")
            folder = folders[chosen[0]]
        places = sorted(path for path in (folder / EVALUATIONS).glob("*") if path.is_dir())
        if not any(read_manifest(place) for place in places):
            raise UserError(f"{folder}: no finished evaluation; run `g2rpo score` on its cell")
    return {digest: place for place in places if (digest := _protocol(place)) is not None}


def _protocol(evaluation: Path) -> str | None:
    manifest = read_scored(evaluation)
    if manifest is None:
        return None
    with reporting_damage(evaluation / MANIFEST):
        return protocol_hash(manifest["inputs"])


def _side(evaluation: Path) -> Side:
    from benchmarks.evaluation.held_out import image_path  # slow: imports the model libraries

    scores = pd.read_parquet(evaluation / SCORES)
    texts = dict(zip(scores["prompt_id"].astype(str), scores["prompt"].astype(str), strict=True))
    folder = evaluation / "images"
    paths = {one: image_path(folder, Prompt(one, text)) for one, text in texts.items()}
    pictures = {one: Picture(texts[one], path) for one, path in paths.items() if path.is_file()}
    label = "/".join(evaluation.resolve().parts[-3::2])
    return Side(label, pictures, _protocol(evaluation), len(texts))


def _folder_side(folder: Path, prompts: Path | None, skip_bad: bool) -> Side:
    known = None if prompts is None else read_prompts(prompts)
    source = read_source(folder, known, every_prompt=False)
    refuse_bad(source, skip_bad, "compared")
    pictures: dict[str, Picture] = {}
    for item in source.items:  # the first of several images of a prompt
        pictures.setdefault(item.prompt_id, Picture(item.prompt, item.image))
    return Side(str(folder), pictures, None, len(pictures), tuple(source.bad))
