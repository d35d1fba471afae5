"""Images as data URIs, each once, and as many as fit into the page's size."""

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from g2rpo.data.images import to_rgb
from reproduce.report.pictures import Amount, Gallery, reduced

PROMPTS = 12
"""Prompts of a chapter that are shown where all fit."""
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
"""What is tried in turn until it fits."""
SMALL = 128
"""Images up to so many pixels a side are kept exactly; larger ones as a photograph would be."""
_QUALITY = 82
_SAMPLE = 6
_TOO_MANY = 1.6


@dataclass
class Encoder:
    """Image files as data URIs of one largest size; what looks the same is there once.

    Attributes:
        side: the longest side, pixels; None leaves them as they are.
        uris: the data URI of each image, by its name on the page.
        names: the name of each file's image.
    """

    side: int | None
    uris: dict[str, str] = field(default_factory=dict)
    names: dict[Path, str] = field(default_factory=dict)

    def add(self, path: Path) -> None:
        """Encodes a file that was not."""
        if path in self.names:
            return
        data = _webp(path, self.side)
        name = hashlib.sha256(data).hexdigest()[:16]
        self.names[path] = name
        if name not in self.uris:
            self.uris[name] = "data:image/webp;base64," + base64.b64encode(data).decode()


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


@dataclass(frozen=True)
class Fitted:
    """What fits.

    Attributes:
        galleries: the part of each that is shown.
        encoder: its images.
        notes: what was left out for the size, if anything.
    """

    galleries: tuple[Gallery, ...]
    encoder: Encoder
    notes: tuple[str, ...]


def fit(galleries: Sequence[Gallery], room: int) -> Fitted:
    """The most of the galleries whose images take at most ``room`` characters."""
    whole = _unique(galleries)
    encoders: dict[int | None, Encoder] = {}
    for step, amount in enumerate(LADDER):
        parts = tuple(reduced(gallery, amount) for gallery in galleries)
        encoder = encoders.setdefault(amount.side, Encoder(amount.side))
        paths = _unique(parts)
        if _fits(paths, encoder, room):
            notes = (_note(whole, paths, amount),) if step else ()
            return Fitted(parts, _only(encoder, paths), notes)
    none = tuple(Gallery((), (), gallery.notes) for gallery in galleries)
    note = f"None of {len(whole)} images is shown: the page has no room for them."
    return Fitted(none, Encoder(None), (note,) if whole else ())


def _unique(galleries: Iterable[Gallery]) -> list[Path]:
    found = (
        path
        for gallery in galleries
        for tile in gallery.tiles
        for frame in tile.frames
        for path in frame.images.values()
    )
    return list(dict.fromkeys(found))


def _fits(paths: Sequence[Path], encoder: Encoder, room: int) -> bool:
    # Encoding hundreds of large images only to find that they are far too many takes minutes.
    sample = paths[:: max(1, len(paths) // _SAMPLE)]
    guess = sum(_size(encoder, path) for path in sample) / max(1, len(sample)) * len(paths)
    if guess > _TOO_MANY * room:
        return False
    total = 0
    for path in paths:
        total += _size(encoder, path)
        if total > room:
            return False
    return True


def _size(encoder: Encoder, path: Path) -> int:
    """Characters that an image takes on the page, with its name and the quotes around both."""
    encoder.add(path)
    name = encoder.names[path]
    return len(encoder.uris[name]) + len(name) + 6


def _only(encoder: Encoder, paths: Sequence[Path]) -> Encoder:
    names = {path: encoder.names[path] for path in paths}
    return Encoder(encoder.side, {name: encoder.uris[name] for name in names.values()}, names)


def _note(whole: Sequence[Path], shown: Sequence[Path], amount: Amount) -> str:
    said = [f"the first {amount.prompts} prompts" if amount.prompts > 1 else "the first prompt"]
    if amount.seeds is not None:
        said.append("one training seed")
    if amount.between == 0:
        said.append("the base and the end alone")
    elif amount.between is not None:
        said.append(f"at most {amount.between} moments between base and end")
    if amount.side is not None:
        said.append(f"at most {amount.side} pixels a side")
    return (
        f"{len(shown)} of {len(whole)} image files are shown, to keep the page small: "
        f"{', '.join(said)}."
    )
