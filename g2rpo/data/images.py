"""Reads image files as 8-bit RGB, by one rule for all reward models.

The rule, in this order:

- animations and multi-page files: the first frame;
- the EXIF orientation is applied;
- 16 bits per channel: the high byte (as Pillow reads 16-bit colour files; netpbm files are scaled
  by their stated maximum); 12 bits: the upper eight;
- palettes are resolved; gray is repeated in the three channels;
- transparency is composited over white;
- CMYK, YCbCr, Lab and HSV are converted by Pillow; embedded colour profiles are ignored;
- floating-point, signed and 32-bit images and scientific formats are rejected, since their white is
  undefined; so are 16-bit colours with a transparent one, which 8 bits cannot distinguish.

8-bit RGB is unchanged. Text in a file is ignored, whatever its size.
"""

import hashlib
import io
import struct
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from g2rpo.errors import UserError, reason

_NO_PIXELS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow only identifies, or reads through another program."""
_SIXTEEN_BITS = frozenset({"PNG", "TIFF", "JPEG2000", "PPM", "IM"})
"""Formats whose 16-bit gray ranges from black to white; in others it is a measurement."""
_GRAY_STEPS = {"1": 255, "L;2": 85, "L;4": 17}
"""Pillow's factor for gray of fewer bits, which it does not apply to the transparent colour."""
_TRANSPARENT = {"RGBA", "LA", "PA", "RGBa", "La"}
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTED = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Texts of a PNG file that may hold its orientation."""
_filters = Lock()


@dataclass(frozen=True)
class LoadedImage:
    """A file's ``pixels``, uint8 ``[H, W, 3]``, and the SHA-256 of its bytes."""

    pixels: Tensor
    sha256: str


@cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the supported formats."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _NO_PIXELS)


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of image files in a folder, in lower case."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in image_formats())


def load_image(path: Path) -> LoadedImage:
    """Reads the image file ``path`` by the rule of this module.

    Raises:
        UserError: the file is missing, not an image, damaged, or of a rejected kind.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return LoadedImage(decode_image(data, str(path)), hashlib.sha256(data).hexdigest())


def decode_image(data: bytes, name: str) -> Tensor:
    """The pixels of an image file with the content ``data``, uint8 ``[H, W, 3]``.

    Raises:
        UserError: not an image, damaged, or of a rejected kind; begins with ``name``.
    """
    try:
        with _opened(io.BytesIO(_without_text(data))) as image:
            pixels = np.array(to_rgb(image))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(
            f"{name}: more than {limit / 1e6:.3g} megapixels, which is the limit; make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise UserError(
            f"{name}: not a readable image (empty, or of an unknown format or depth)"
        ) from None
    # Pillow's decoders raise nearly anything for damaged files.
    except Exception as error:
        raise UserError(f"{name}: not a readable image ({reason(error)})") from None
    return torch.from_numpy(pixels)


def is_image(path: Path) -> bool:
    """Whether Pillow identifies the file ``path`` as an image, intact or damaged."""
    try:
        with _opened(path):
            return True
    except (UnidentifiedImageError, OSError):
        return False
    except Exception:
        return True


def _opened(file: Path | io.BytesIO) -> Image.Image:
    # Pillow warns from half of its limit on. Warning filters are global.
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=image_formats())


def _without_text(data: bytes) -> bytes:
    """A PNG file without texts and colour profile, which may be damaged or larger than its pixels.

    Programs store whole workflows there; Pillow rejects more than a megabyte.
    """
    if not data.startswith(_PNG):
        return data
    kept, start = [_PNG], len(_PNG)
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + length + 12
        text = kind in (b"tEXt", b"zTXt", b"iTXt") and not data.startswith(_ORIENTED, start + 8)
        if not text and kind != b"iCCP":
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as 8-bit RGB by the rule of this module.

    Raises:
        UserError: the rule rejects this kind of image.
    """
    raw = _raw_mode(image)
    problem = _refused(image, raw)
    if problem is not None:
        raise UserError(f"{problem}; save it as 8-bit RGB")
    tags = getattr(image, "tag_v2", {})  # of TIFF
    deep = image.mode.startswith("I")
    image.load()
    with suppress(Exception):  # ignore damaged EXIF: reading it again does not raise
        image.getexif()
    image = ImageOps.exif_transpose(image)
    key = image.info.get("transparency")
    if deep:
        image = _upper_bits(image, 4 if raw == "I;12" else 8, white_is_zero=tags.get(262) == 0)
    elif raw in _GRAY_STEPS and isinstance(key, int):
        image.info["transparency"] = min(255, key * _GRAY_STEPS[raw])
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        # Pillow cannot convert La to RGBA directly.
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _raw_mode(image: Image.Image) -> str:
    """Pillow's raw mode, the pixel layout in the file; empty if unknown."""
    tiles = getattr(image, "tile", None) or [("", None, 0, "")]
    arguments = tiles[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _refused(image: Image.Image, raw: str) -> str | None:
    if image.mode == "F":
        return "a floating-point image has no defined white"
    # Pillow also uses mode I for 16-bit netpbm files, and for PNG before version 11.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        kind = "signed 16-bit" if ";16" in raw else "32-bit"
        return f"a {kind} image has no defined white"
    if image.mode.startswith("I;") and image.format not in _SIXTEEN_BITS:
        return f"a 16-bit {image.format} image has no defined white"
    sample = getattr(image, "tag_v2", {}).get(339, 1)
    if 2 in (sample if isinstance(sample, tuple) else (sample,)):
        return "a signed image has no defined white"
    if image.mode == "RGB" and ";16" in raw and "transparency" in image.info:
        return "a 16-bit image with a transparent colour cannot be reduced exactly"
    return None


def _upper_bits(image: Image.Image, shift: int, *, white_is_zero: bool) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    gray = (values >> shift).astype(np.uint8)
    if white_is_zero:  # Pillow inverts 8 bits, but not 16
        gray = 255 - gray
    key = image.info.get("transparency")
    if key is not None:
        gray = np.dstack([gray, np.where(values == key, 0, 255).astype(np.uint8)])
    return Image.fromarray(gray)
