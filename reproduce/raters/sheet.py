"""A sheet for raters: blinded pairs of images in random order.

Nothing in the folder reveals the model of an image: file names, metadata, times and order follow
the order of the pairs, which is random, as are their sides.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from g2rpo.data.images import load_image
from g2rpo.errors import UserError
from g2rpo.files import atomic_folder, check_place, write_json
from g2rpo.seeds import generator
from g2rpo.text import plain_value
from reproduce.raters.key import COLUMNS, Pair, SheetKey, read_key
from reproduce.raters.pictures import Side
from reproduce.tables.formats import csv_table

QUESTION = "Which picture is better for the caption?"
PAGE, ANSWERS, IMAGES = "index.html", "answers.csv", "images"
FIXED_TIME = 946_684_800
"""Modification time of every file in a sheet: the year 2000, which zip can store."""


def key_path(output: Path) -> Path:
    """The key of the sheet in ``output``: beside it, so that the folder can be shared as it is."""
    return output.with_name(f"{output.name}-key.json")


def check_output(output: Path) -> None:
    """Checks that a new sheet and its key can be written to ``output``.

    Raises:
        UserError: it has no name, exists already, or cannot be created.
    """
    if output.name in ("", ".."):
        raise UserError(f"{output}: not a new folder; use e.g. {output / 'sheet'}")
    key = key_path(output)
    try:
        if (output / PAGE).is_file() and not key.exists():
            raise UserError(
                f"{output}: a sheet without its key {key.name}; delete it or choose another folder"
            )
        if os.path.lexists(output):
            raise UserError(f"{output}: already exists; choose another folder")
        _earlier_key(key)
        check_place(output)
    except OSError as error:  # a name that is too long
        raise UserError(
            f"{output}: cannot be created ({error.strerror}); choose another folder"
        ) from None


def make_sheet(
    sides: Sequence[Side], output: Path, *, pairs: int | None, seed: int, question: str = QUESTION
) -> SheetKey:
    """Writes a sheet to the new folder ``output`` and its key beside it.

    The key is written first, since a sheet is useless without it. The key of an earlier sheet is
    renamed after that sheet. ``pairs`` are chosen at random; None takes all. Anyone who knows
    ``seed``, of the order and sides, can undo the blinding.

    Raises:
        UserError: ``output`` exists or cannot be created, there are fewer than ``pairs`` prompts
            with images of both sides, or an image is corrupt or differs in size from its
            counterpart.
    """
    check_output(output)
    key = _arranged(sides, pairs, seed, question)
    with atomic_folder(output) as folder:
        (folder / IMAGES).mkdir()
        for pair in key.pairs:
            _copy_pair(pair, sides, folder / IMAGES)
        (folder / PAGE).write_text(_page(key), encoding="utf-8")
        blank = [[key.sheet, "", pair.pair, ""] for pair in key.pairs]
        (folder / ANSWERS).write_text(csv_table(COLUMNS, blank))
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (FIXED_TIME, FIXED_TIME))
        _keep_earlier_key(key_path(output))
        write_json(key_path(output), key.model_dump(mode="json"))
    return key


def _earlier_key(path: Path) -> SheetKey | None:
    if not path.exists():
        return None
    try:
        return read_key(path)
    except UserError:
        raise UserError(f"{path}: exists and is not a key; choose another folder") from None


def _keep_earlier_key(path: Path) -> None:
    """Renames an earlier key, because its sheet may be in use."""
    earlier = _earlier_key(path)
    if earlier is not None:
        path.replace(path.with_name(f"{path.stem}-{earlier.sheet}.json"))


def _arranged(sides: Sequence[Side], pairs: int | None, seed: int, question: str) -> SheetKey:
    first, second = sides
    shared = sorted(set(first.pictures) & set(second.pictures))
    if not shared:
        raise UserError(f"{first.label} and {second.label} have no images of the same prompt")
    if pairs is not None and pairs > len(shared):
        raise UserError(
            f"--pairs {pairs}: only {len(shared)} prompts have images of both sides; raise "
            "keep_images in the profile to keep more"
        )
    rng = generator(seed, "raters")
    order = [shared[index] for index in rng.permutation(len(shared))][:pairs]
    # Each side is on the left equally often, so a preference for one place favours neither.
    left = rng.permutation(np.arange(len(order)) % 2 == 0)
    digits = max(3, len(str(len(order))))
    found = []
    for number, (prompt_id, first_left) in enumerate(zip(order, left, strict=True), start=1):
        one, two = first.pictures[prompt_id], second.pictures[prompt_id]
        if one.prompt != two.prompt:
            raise UserError(f"prompt {prompt_id!r}: the sides have different prompt texts")
        found.append(
            Pair(
                pair=f"{number:0{digits}d}",
                prompt_id=prompt_id,
                prompt=one.prompt,
                left="first" if first_left else "second",
                first_sha256=load_image(one.path).sha256,
                second_sha256=load_image(two.path).sha256,
            )
        )
    return SheetKey(
        sheet=rng.bytes(6).hex(),
        first=first.label,
        second=second.label,
        protocol=first.protocol if first.protocol == second.protocol else None,
        seed=seed,
        question=question,
        pairs=tuple(found),
    )


def _copy_pair(pair: Pair, sides: Sequence[Side], folder: Path) -> None:
    """Writes both images from their pixels, without metadata."""
    by_name = {"first": sides[0], "second": sides[1]}
    other = "second" if pair.left == "first" else "first"
    placed = {"a": by_name[pair.left], "b": by_name[other]}
    pixels = {
        place: load_image(side.pictures[pair.prompt_id].path).pixels.numpy()
        for place, side in placed.items()
    }
    if pixels["a"].shape != pixels["b"].shape:
        raise UserError(
            f"prompt {pair.prompt_id!r}: the images differ in size, which would reveal the model"
        )
    for place, picture in pixels.items():
        Image.fromarray(picture).save(folder / f"{pair.pair}{place}.png", format="PNG")


def _page(key: SheetKey) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
        finalize=plain_value,
    )
    pairs = [{"pair": pair.pair, "prompt": pair.prompt} for pair in key.pairs]
    return environment.get_template("sheet.html.j2").render(
        sheet=key.sheet, question=key.question, pairs=pairs, images=IMAGES
    )
