"""Grids of images: the same prompts under several models, as one PNG and PDF."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from g2rpo.files import atomic_path
from reproduce.tables.figures import PDF_METADATA

SIDE = 128
"""Longest side of an image in the grid, in pixels."""
PDF_DPI = 150
_FONT_SIZE, _LINE_HEIGHT, _TEXT_WIDTH, _GAP = 12, 16, 154, 8
_INK, _PAPER, _FRAME = (26, 26, 26), (255, 255, 255), (190, 190, 190)


def _font(weight: str = "normal") -> ImageFont.FreeTypeFont:
    # Matplotlib ships this font, so the grid does not depend on the system's fonts.
    properties = font_manager.FontProperties(family="DejaVu Sans", weight=weight)
    return ImageFont.truetype(font_manager.findfont(properties), _FONT_SIZE)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Wraps ``text`` at ``width`` pixels; longer words are broken."""
    for characters in range(max(4, width // 3), 3, -1):
        lines = textwrap.wrap(text, characters)
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont,
    corner: tuple[float, float],
    anchor: str = "la",
) -> None:
    for number, text in enumerate(lines):
        spot = (corner[0], corner[1] + _LINE_HEIGHT * number)
        draw.text(spot, text, fill=_INK, font=font, anchor=anchor)


def _fitted(image: npt.NDArray[np.uint8]) -> Image.Image:
    """Scales an image to :data:`SIDE` pixels: up by whole factors, else down by resampling."""
    picture = Image.fromarray(image).convert("RGB")
    longest = max(picture.size)
    if longest <= SIDE:
        width, height = (length * (SIDE // longest) for length in picture.size)
        return picture.resize((width, height), Image.Resampling.NEAREST)
    width, height = (max(1, round(length * SIDE / longest)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def picture_grid(
    columns: Mapping[str, Sequence[npt.NDArray[np.uint8]]],
    prompts: Sequence[str],
    output: Path,
) -> Path:
    """Writes a grid with a row per prompt, a column per model and captions on the left.

    Small images are enlarged by whole factors without smoothing; large ones are downscaled.

    Args:
        columns: model label to its images, [H, W, 3], one per prompt.
        prompts: the captions, in the order of the images.
        output: the PNG to write, which is returned; a PDF with the same pixels goes beside it.
    """
    bold, plain = _font("bold"), _font()
    heads = [_wrapped(label, bold, SIDE) for label in columns]
    captions = [_wrapped(prompt, plain, _TEXT_WIDTH) for prompt in prompts]
    first_row = _GAP + _LINE_HEIGHT * max(map(len, heads)) + _GAP // 2
    heights = [max(SIDE, _LINE_HEIGHT * len(caption)) for caption in captions]
    tops = [first_row + sum(heights[:row]) + _GAP * row for row in range(len(heights))]
    lefts = [2 * _GAP + _TEXT_WIDTH + (SIDE + _GAP) * column for column in range(len(columns))]
    canvas = Image.new("RGB", (lefts[-1] + SIDE + _GAP, tops[-1] + heights[-1] + _GAP), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for head, left in zip(heads, lefts, strict=True):
        top = first_row - _GAP // 2 - _LINE_HEIGHT * len(head)
        _write(draw, head, bold, (left + SIDE / 2, top), anchor="ma")
    for caption, top, height in zip(captions, tops, heights, strict=True):
        _write(draw, caption, plain, (_GAP, top + (height - _LINE_HEIGHT * len(caption)) // 2))
    for images, left in zip(columns.values(), lefts, strict=True):
        for image, top, height in zip(images, tops, heights, strict=True):
            _place(canvas, image, (left, top + (height - SIDE) // 2))
    with atomic_path(output) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)
    _save_as_pdf(canvas, output.with_suffix(".pdf"))
    return output


def _save_as_pdf(picture: Image.Image, output: Path) -> None:
    """Writes an image's pixels losslessly."""
    width, height = picture.size
    figure = Figure(figsize=(width / PDF_DPI, height / PDF_DPI), dpi=PDF_DPI)
    figure.figimage(np.asarray(picture))
    with atomic_path(output) as temporary:
        figure.savefig(temporary, format="pdf", dpi=PDF_DPI, metadata=PDF_METADATA)


def _place(canvas: Image.Image, image: npt.NDArray[np.uint8], corner: tuple[int, int]) -> None:
    """Pastes an image into the middle of its square, inside a thin frame."""
    picture = _fitted(image)
    width, height = picture.size
    left, top = corner[0] + (SIDE - width) // 2, corner[1] + (SIDE - height) // 2
    canvas.paste(picture, (left, top))
    frame = (left - 1, top - 1, left + width, top + height)
    ImageDraw.Draw(canvas).rectangle(frame, outline=_FRAME)
