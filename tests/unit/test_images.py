"""Every kind of image file becomes 8-bit RGB by the documented rule, or is refused by name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from g2rpo.data.images import load_image
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


def test_a_jpeg_is_what_pillow_decodes(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.jpg")
    np.testing.assert_array_equal(
        loaded(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg"))
    )


def test_gray_is_repeated_and_black_and_white_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(GRAY).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(loaded(tmp_path / "gray.png"), np.repeat(GRAY[..., None], 3, 2))
    Image.fromarray(GRAY > 127).save(tmp_path / "bits.png")
    expected = np.where(GRAY > 127, 255, 0)[..., None]
    np.testing.assert_array_equal(loaded(tmp_path / "bits.png"), np.repeat(expected, 3, 2))


def test_sixteen_bits_keep_the_high_byte(tmp_path: Path) -> None:
    deep = GRAY.astype(np.uint16) * 256 + 255
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        np.testing.assert_array_equal(loaded(tmp_path / name), np.repeat(GRAY[..., None], 3, 2))


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    indexed = Image.fromarray(RGB).quantize(16)
    indexed.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(
        loaded(tmp_path / "palette.png"), np.asarray(indexed.convert("RGB"))
    )


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


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.fromarray(RGB).quantize(32), Image.fromarray(255 - RGB).quantize(32)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    expected = np.asarray(frames[0].convert("RGB")).astype(int)
    assert np.abs(loaded(tmp_path / "two.gif") - expected).mean() < 1


def test_cmyk_is_converted_by_pillow(tmp_path: Path) -> None:
    ink = Image.fromarray(RGB).convert("CMYK")
    ink.save(tmp_path / "ink.tif")
    np.testing.assert_array_equal(loaded(tmp_path / "ink.tif"), np.asarray(ink.convert("RGB")))


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    import hashlib

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
        "empty.png": "empty, or of no known format",
        "text.png": "no known format",
        "float.tif": "floating-point",
        "wide.tif": "32-bit",
        "missing.png": "no such image",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
