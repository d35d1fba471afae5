"""Images as data URIs without duplicates, as many as fit on the page."""

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from g2rpo.data.images import to_rgb
from reproduce.report.pictures import Amount, Gallery, reduced

PROMPTS = 12
"""Maximum prompts per chapter."""
LADDER = (
    Amount(None, PROMPTS),
    Amount(None, PROMPTS, seeds=1),
    Amount(512, PROMPTS, seeds=1),
    Amount(512, 8, seeds=1),
    Amount(384, 8, seeds=1),
    Amount(384, 8, seeds=1, between=3),
    Amount(384, 6, seeds=1, between=3),
    Amount(256, 6, seeds=1, between=3),
    Amount(256, 6, seeds=1, between=0),
    Amount(256, 4, seeds=1, between=0),
    Amount(192, 2, seeds=1, between=0),
    Amount(128, 1, seeds=1, between=0),
)
"""Tried in turn until the images fit."""
SMALL = 128
"""Images up to this many pixels a side are encoded losslessly."""
_QUALITY = 82
_SAMPLE = 6
_TOO_MANY = 1.6


@dataclass(frozen=True)
class Fitted:
    """The images that fit.

    Attributes:
        galleries: the part of each that is shown.
        names: the name on the page of each file's image; identical images share one name.
        uris: the data URI of each image, by its name.
        notes: what was omitted.
    """

    galleries: tuple[Gallery, ...]
    names: dict[Path, str]
    uris: dict[str, str]
    notes: tuple[str, ...]


class Fitter:
    """Fits galleries into a size; a file is encoded once per size."""

    def __init__(self, galleries: Sequence[Gallery]) -> None:
        self.galleries = galleries
        self._whole = _files(galleries)
        self._known: dict[tuple[Path, int | None], tuple[str, str]] = {}

    def __call__(self, room: int) -> Fitted:
        """As many images as fit into ``room`` characters."""
        for step, amount in enumerate(LADDER):
            parts = tuple(reduced(gallery, amount) for gallery in self.galleries)
            files = _files(parts)
            if self._fits(files, amount.side, room):
                found = {path: self._encoded(path, amount.side) for path in files}
                names = {path: name for path, (name, _) in found.items()}
                notes = (_note(self._whole, files, amount),) if step else ()
                return Fitted(parts, names, dict(found.values()), notes)
        none = tuple(replace(gallery, prompts=(), shots=()) for gallery in self.galleries)
        note = f"None of {len(self._whole)} images fit on the page."
        return Fitted(none, {}, {}, (note,))

    def _fits(self, files: Sequence[Path], side: int | None, room: int) -> bool:
        # Encoding hundreds of large images takes minutes, so a sample is tried first.
        sample = files[:: max(1, len(files) // _SAMPLE)]
        guess = sum(self._size(path, side) for path in sample) / max(1, len(sample)) * len(files)
        if guess > _TOO_MANY * room:
            return False
        return sum(self._size(path, side) for path in files) <= room

    def _size(self, path: Path, side: int | None) -> int:
        """Characters of an image on the page, with its name and quotes."""
        name, uri = self._encoded(path, side)
        return len(uri) + len(name) + 6

    def _encoded(self, path: Path, side: int | None) -> tuple[str, str]:
        """The name and data URI of a file at ``side`` pixels at most."""
        if (path, side) not in self._known:
            data = _webp(path, side)
            uri = "data:image/webp;base64," + base64.b64encode(data).decode()
            self._known[path, side] = hashlib.sha256(data).hexdigest()[:16], uri
        return self._known[path, side]


def _files(galleries: Iterable[Gallery]) -> list[Path]:
    return list(dict.fromkeys(shot.path for gallery in galleries for shot in gallery.shots))


def _webp(path: Path, side: int | None) -> bytes:
    with Image.open(path) as opened:
        image = to_rgb(opened)
    exact = max(image.size) <= SMALL
    if side is not None and max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if exact:
        image.save(buffer, format="WEBP", lossless=True, quality=100)
    else:
        image.save(buffer, format="WEBP", quality=_QUALITY)
    return buffer.getvalue()


def _note(whole: Sequence[Path], shown: Sequence[Path], amount: Amount) -> str:
    shares = [f"the first {amount.prompts} prompts" if amount.prompts > 1 else "the first prompt"]
    if amount.seeds is not None:
        shares.append("one training seed")
    if amount.between == 0:
        shares.append("the base and the last iteration")
    elif amount.between is not None:
        shares.append(f"at most {amount.between} iterations between them")
    if amount.side is not None:
        shares.append(f"at most {amount.side} pixels a side")
    return (
        f"Showing {len(shown)} of {len(whole)} images to keep the page small: {', '.join(shares)}."
    )
