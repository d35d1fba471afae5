"""Every kind of image file becomes 8-bit RGB by the documented rule, or is refused by name."""

import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from g2rpo.data.images import load_image, to_rgb
from g2rpo.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
GRAY = RGB[..., 0]


def loaded(path: Path) -> np.ndarray:
    pixels = load_image(path).pixels.numpy()
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    return pixels


def test_plain_rgb_passes_unchanged(tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp", "a.tif", "a.ppm"):
        Image.fromarray(RGB).save(tmp_path / name)
        np.testing.assert_array_equal(loaded(tmp_path / name), RGB)


def test_other_colours_are_what_pillow_decodes_and_converts(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    kinds = {"a.jpg": image, "palette.png": image.quantize(16), "ink.tif": image.convert("CMYK")}
    for name, saved in kinds.items():
        saved.save(tmp_path / name)
        expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        np.testing.assert_array_equal(loaded(tmp_path / name), expected)


def test_gray_is_repeated_and_black_and_white_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(GRAY).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(loaded(tmp_path / "gray.png"), np.repeat(GRAY[..., None], 3, 2))
    Image.fromarray(GRAY > 127).save(tmp_path / "bits.png")
    expected = np.where(GRAY > 127, 255, 0)[..., None]
    np.testing.assert_array_equal(loaded(tmp_path / "bits.png"), np.repeat(expected, 3, 2))


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    alpha = np.tile(np.linspace(0, 255, 30).astype(np.uint8), (20, 1))
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / "alpha.png")
    share = alpha[..., None] / 255
    expected = RGB * share + 255 * (1 - share)
    np.testing.assert_allclose(loaded(tmp_path / "alpha.png"), expected, atol=1)
    assert (loaded(tmp_path / "alpha.png")[:, 0] == 255).all()
    Image.fromarray(np.dstack([GRAY, alpha]), mode="LA").save(tmp_path / "la.png")
    expected = np.repeat(GRAY[..., None] * share + 255 * (1 - share), 3, 2)
    np.testing.assert_allclose(loaded(tmp_path / "la.png"), expected, atol=1)


def test_a_transparent_palette_colour_is_white(tmp_path: Path) -> None:
    indexed = Image.fromarray(np.where(GRAY > 127, 1, 0).astype(np.uint8), mode="P")
    indexed.putpalette([10, 20, 30, 200, 100, 50])
    for name in ("key.png", "key.gif"):
        indexed.save(tmp_path / name, transparency=0)
        expected = np.where((GRAY > 127)[..., None], [200, 100, 50], 255)
        np.testing.assert_array_equal(loaded(tmp_path / name), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB, 1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(loaded(tmp_path / "turned.png"), turned[orientation])


def test_of_layers_their_composite_counts(tmp_path: Path) -> None:
    height, width, _ = RGB.shape
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, 8, 3)
    body = struct.pack(">IIIH", 0, 0, 0, 0) + RGB.transpose(2, 0, 1).tobytes()
    (tmp_path / "flat.psd").write_bytes(head + body)
    np.testing.assert_array_equal(loaded(tmp_path / "flat.psd"), RGB)


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.fromarray(RGB).quantize(32), Image.fromarray(255 - RGB).quantize(32)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    expected = np.asarray(frames[0].convert("RGB")).astype(int)
    assert np.abs(loaded(tmp_path / "two.gif") - expected).mean() < 1


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    digest = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    assert load_image(tmp_path / "a.png").sha256 == digest


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    Image.fromarray(GRAY.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(GRAY.astype(np.int32) * 100_000).save(tmp_path / "wide.tif")
    reasons = {
        "cut.png": "truncated",
        "empty.png": "empty, or of an unknown format",
        "text.png": "unknown format",
        "float.tif": "floating-point",
        "wide.tif": "32-bit",
        "missing.png": "no such image",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


# --- more than eight bits, signs, transparency: each against its 8-bit twin --------------------


def png(bits: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of two pixels in one row, its other chunks before the pixels."""
    header = (b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0))
    written = (header, *chunks, (b"IDAT", zlib.compress(b"\0" + rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in written
    )


def tiff(bits: int, data: bytes, *, order: str = "<", photometric: int = 1, **other: int) -> bytes:
    """A gray TIFF of two pixels in one row; ``other``: ``sample`` its format, ``extra`` samples."""
    channels = 1 + ("extra" in other)
    depth = bits if channels == 1 else bits | bits << 16 if order == "<" else bits << 16 | bits
    tags = {256: 2, 257: 1, 258: depth, 259: 1, 262: photometric, 277: channels}
    tags |= {273: 0, 278: 1, 279: len(data), 339: other.get("sample", 1)}
    if "extra" in other:
        tags |= {338: other["extra"], 339: 1 | 1 << 16}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, value in sorted(tags.items()):
        if tag in (258, 339):
            entries += struct.pack(order + "HHI", tag, 3, channels)
            entries += struct.pack(order + "HH", value & 0xFFFF, value >> 16)
        else:
            entries += struct.pack(order + "HHII", tag, 4, 1, value)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = struct.pack(order + "IH", 8, len(tags))
    return mark + head + entries + b"\0" * 4 + data


def words(*values: int, order: str = "<") -> bytes:
    return struct.pack(f"{order}{len(values)}H", *values)


def scientific(pixels: np.ndarray, bits: int) -> bytes:
    cards = ("SIMPLE  = T", f"BITPIX  = {bits}", "NAXIS   = 2", "NAXIS1  = 2", "NAXIS2  = 1", "END")
    head = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    return head + pixels.tobytes().ljust(2880, b"\0")


TWO = (0x12, 0xC8)
"""The gray values that each file below has, in eight bits."""
DEEP = (0x1234, 0xC8FF)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(png(16, 0, words(*DEEP, order=">")), TWO, id="png16"),
        pytest.param(
            png(16, 0, words(*DEEP, order=">"), (b"tRNS", words(DEEP[0], order=">"))),
            (255, TWO[1]),
            id="png16-transparent",
        ),
        pytest.param(
            # Another pixel has the same high byte, but is not the transparent one.
            png(16, 0, words(0x1234, 0x1299, order=">"), (b"tRNS", b"\x12\x34")),
            (255, 0x12),
            id="png16-nearly-transparent",
        ),
        pytest.param(
            png(16, 4, words(DEEP[0], 0xFFFF, DEEP[1], 0, order=">")), (TWO[0], 255), id="png16-LA"
        ),
        pytest.param(
            png(16, 6, words(*[DEEP[0]] * 3, 0xFFFF, *[DEEP[1]] * 3, 0, order=">")),
            (TWO[0], 255),
            id="png16-RGBA",
        ),
        pytest.param(png(16, 2, words(*[DEEP[0]] * 3, *[DEEP[1]] * 3, order=">")), TWO, id="png48"),
        pytest.param(png(1, 0, b"\x40", (b"tRNS", b"\0\0")), (255, 255), id="png1-transparent"),
        pytest.param(png(1, 0, b"\x40", (b"tRNS", b"\0\1")), (0, 255), id="png1-other"),
        pytest.param(png(2, 0, b"\x60", (b"tRNS", b"\0\1")), (255, 170), id="png2-transparent"),
        pytest.param(png(4, 0, b"\x5a", (b"tRNS", b"\0\5")), (255, 170), id="png4-transparent"),
        pytest.param(png(8, 0, bytes(TWO), (b"tRNS", b"\0\x12")), (255, TWO[1]), id="png8-key"),
        pytest.param(
            png(2, 3, b"\x60", (b"PLTE", bytes(range(12))), (b"tRNS", b"\xff\0\xff")),
            (255, (6, 7, 8)),
            id="palette-alpha",
        ),
        pytest.param(tiff(16, words(*DEEP)), TWO, id="tiff16"),
        pytest.param(tiff(16, words(*DEEP, order=">"), order=">"), TWO, id="tiff16-big-endian"),
        pytest.param(
            tiff(16, words(*(0xFFFF - deep for deep in DEEP)), photometric=0), TWO, id="white-is-0"
        ),
        pytest.param(
            tiff(8, bytes(255 - gray for gray in TWO), photometric=0), TWO, id="white-is-0-8"
        ),
        pytest.param(tiff(12, b"\x12\x3c\x8f"), TWO, id="tiff12"),
        pytest.param(tiff(8, bytes((TWO[0], 255, 7, 0)), extra=2), (TWO[0], 255), id="tiff-LA"),
        pytest.param(tiff(8, bytes((64, 128, 9, 255)), extra=1), (191, 9), id="tiff-La"),
        pytest.param(b"P5 2 1 65535\n" + words(*DEEP, order=">"), TWO, id="pgm16"),
        pytest.param(b"P5 2 1 1023\n" + words(0, 1023, order=">"), (0, 255), id="pgm10"),
        pytest.param(b"P2 2 1 65535\n4660 51455\n", TWO, id="pgm16-plain"),
        pytest.param(
            b"P6 2 1 65535\n" + words(*[TWO[0] * 257] * 3, *[TWO[1] * 257] * 3, order=">"),
            TWO,
            id="ppm48",
        ),
        pytest.param(b"P1 2 1\n1 0\n", (0, 255), id="pbm"),
    ],
)
def test_other_depths_are_their_eight_bit_twins(
    tmp_path: Path, data: bytes, expected: tuple[int | tuple[int, int, int], ...]
) -> None:
    (tmp_path / "image").write_bytes(data)
    twin = [[gray if isinstance(gray, tuple) else (gray,) * 3 for gray in expected]]
    np.testing.assert_array_equal(loaded(tmp_path / "image"), twin)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(16, struct.pack("<2h", 5, -5), sample=2), "signed 16-bit"),
        (tiff(8, b"\x05\xfb", sample=2), "signed image"),
        (tiff(32, struct.pack("<2I", 5, 50_000)), "32-bit"),  # values that 16 bits would hold
        (tiff(32, struct.pack("<2f", 0.5, 1), sample=3), "floating-point"),
        (tiff(16, words(1, 2, 3, 4), extra=2), "unknown format or depth"),
        (b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0, 1), "floating-point"),
        (png(16, 2, words(*range(6)), (b"tRNS", bytes(6))), "16-bit image with a transparent"),
        (scientific(np.array([1, 2], ">i2"), 16), "16-bit FITS"),
        (scientific(np.array([1, 2], ">i4"), 32), "32-bit"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 1\n%%EndComments\n", "unknown format"),
    ],
)
def test_what_has_no_eight_bit_twin_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "image").write_bytes(data)
    with pytest.raises(UserError, match=rf"image: .*{reason}"):
        load_image(tmp_path / "image")


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "RGBX", "PA", "RGBa", "I;16L"])
def test_modes_in_memory_are_converted(mode: str) -> None:
    """What few files hold: a plain color survives within the rounding of its color space."""
    color = (200, 120, 40)
    source = Image.new("RGB", (3, 2), color)
    if mode == "I;16L":
        image = Image.frombytes(mode, (3, 2), words(*[0x7890] * 6))
        image.format, color = "IM", (0x78,) * 3
    elif mode == "PA":
        image = source.quantize(2).convert("PA")
    elif mode == "LAB":
        image = ImageCms.profileToProfile(
            source, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    else:
        image = (source.convert("RGBA") if mode == "RGBa" else source).convert(mode)
    found = np.asarray(to_rgb(image))
    assert image.mode == mode
    np.testing.assert_allclose(found, np.full((2, 3, 3), color), atol=2)


# --- much text, many pixels, damage that is not of the pixels ------------------------------------


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"tEXt", b"iCCP"])
def test_much_text_does_not_matter(tmp_path: Path, kind: bytes, after: bool) -> None:
    long = b"workflow " * 300_000
    body = {
        b"zTXt": b"workflow\0\0" + zlib.compress(long),
        b"iTXt": b"workflow\0\1\0\0\0" + zlib.compress(long),
        b"tEXt": b"workflow\0" + long * 25,
        b"iCCP": b"profile\0\0" + zlib.compress(long),
    }[kind]
    data = png(8, 0, bytes(TWO), (kind, body))
    if after:  # before the last chunk, IEND, as some programs write it
        size = len(body) + 12
        data = data[:33] + data[33 + size : -12] + data[33 : 33 + size] + data[-12:]
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(loaded(tmp_path / "a.png")[0, :, 0], TWO)
    assert load_image(tmp_path / "a.png").sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("kind", "body"),
    [(b"zTXt", b"a\0\7xx"), (b"iTXt", b"a\0\1\7\0\0xx"), (b"iCCP", b""), (b"tEXt", b"a\0b")],
)
def test_damaged_text_does_not_matter(tmp_path: Path, kind: bytes, body: bytes) -> None:
    data = bytearray(png(8, 0, bytes(TWO), (kind, body)))
    if kind == b"tEXt":
        data[data.index(kind) + len(kind) + len(body)] ^= 1  # its checksum
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(loaded(tmp_path / "a.png")[0, :, 0], TWO)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
@pytest.mark.parametrize("exif", [b"garbage!!", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_damaged_metadata_does_not_matter(tmp_path: Path, name: str, exif: bytes) -> None:
    Image.fromarray(RGB).save(tmp_path / f"whole{name}", lossless=True)
    Image.fromarray(RGB).save(tmp_path / name, lossless=True, exif=exif)
    np.testing.assert_array_equal(loaded(tmp_path / name), loaded(tmp_path / f"whole{name}"))


def test_how_a_png_is_turned_may_stand_in_its_texts(tmp_path: Path) -> None:
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="3"></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    Image.fromarray(RGB).save(tmp_path / "turned.png", pnginfo=info)
    np.testing.assert_array_equal(loaded(tmp_path / "turned.png"), RGB[::-1, ::-1])


def test_the_limit_of_pixels_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Pillow warns from half of its limit on."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    Image.new("1", (150, 100), 1).save(tmp_path / "large.png")
    Image.new("1", (200, 101)).save(tmp_path / "larger.png")
    assert (loaded(tmp_path / "large.png") == 255).all()
    with pytest.raises(UserError, match=r"larger\.png: more than 0.02 megapixels"):
        load_image(tmp_path / "larger.png")
    assert not recwarn.list
