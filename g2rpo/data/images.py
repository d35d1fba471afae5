"""Image files to 8-bit RGB, once and by one rule, whatever they hold and whoever judges them.

The rule, in this order:

- of an animation or a multi-page file, the first frame;
- turned as its EXIF orientation says;
- 16 bits a channel: the high byte (which is what Pillow reads of 16-bit colour files);
- palettes are looked up; gray is repeated in the three channels;
- transparency is laid over white, as a page would show it;
- CMYK, YCbCr, Lab and HSV are converted by Pillow; embedded colour profiles are not applied;
- floating-point images are refused, for nothing says what their white is.

Plain 8-bit RGB passes through unchanged.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from g2rpo.errors import UserError

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm"}
)
"""File names that are taken for images in a folder."""
_TRANSPARENT = {"RGBA", "LA", "PA", "RGBa", "La"}


@dataclass(frozen=True)
class LoadedImage:
    """``pixels`` uint8 ``[H, W, 3]`` of a file, and the SHA-256 of the file's bytes."""

    pixels: Tensor
    sha256: str


def load_image(path: Path) -> LoadedImage:
    """Reads the image file ``path`` by the rule of this module.

    Raises:
        UserError: the file is missing, no image, damaged, or of a kind that the rule refuses.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(to_rgb(image))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: more pixels than Pillow reads safely; make it smaller") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a readable image (empty, or of no known format)") from None
    # Damaged files make Pillow's decoders raise nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason})") from None
    return LoadedImage(torch.from_numpy(pixels), hashlib.sha256(data).hexdigest())


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as 8-bit RGB by the rule of this module.

    Raises:
        UserError: the rule refuses this kind of image.
    """
    image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UserError("a floating-point image has no defined white; save it as 8-bit RGB")
    if image.mode.startswith("I"):
        image = Image.fromarray(_high_byte(image))
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _high_byte(image: Image.Image) -> NDArray[np.uint8]:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UserError("a 32-bit image has no defined white; save it as 8-bit RGB")
    return (values >> 8).astype(np.uint8)
