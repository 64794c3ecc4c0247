"""Image files of every kind: what they decode to, and why bad ones are rejected."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from data.helpers import encode, photo
from PIL import Image

from fastsp.data.decode import ImageDecoder
from fastsp.data.samples import BadSample

H, W = 60, 90
RGB = photo(0, H, W)


def decode(file, channels=3):
    (image,) = ImageDecoder(channels, torch.device("cpu"), threads=1)([file])
    return image if isinstance(image, BadSample) else np.asarray(image)


def difference(image, expected):
    assert image.shape == expected.shape and image.dtype == np.uint8
    return np.abs(image.astype(int) - expected).max()


def png(header: tuple, rows: bytes) -> bytes:
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    ihdr = struct.pack(">IIBBBBB", *header)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png((width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0), rows)


def test_lossless_kinds():
    for file in (encode(RGB, "PNG"), encode(RGB, "BMP"), encode(RGB, "TIFF"), encode(RGB, "WEBP", lossless=True)):
        assert difference(decode(file), RGB) == 0


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_equals_pillow(options):
    file = encode(RGB, "JPEG", quality=85, **options)
    assert difference(decode(file), np.asarray(Image.open(io.BytesIO(file)))) == 0


def test_grey_images_become_rgb_and_the_other_way_round():
    grey = RGB[..., 0]
    for kind in ("PNG", "JPEG"):
        image = decode(encode(grey, kind, quality=95))
        assert difference(image, np.repeat(image[..., :1], 3, -1)) == 0 and difference(image[..., 0], grey) < 12
    luminance = np.asarray(Image.fromarray(RGB).convert("L"))[..., None]
    assert difference(decode(encode(RGB, "PNG"), channels=1), luminance) <= 2


def test_16_bits_keep_their_upper_half():
    """Pillow clips 16-bit grey images at 255."""
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        deep = rng.integers(0, 65536, (H, W, channels))
        assert difference(decode(png_of_16_bits(deep)), np.broadcast_to(deep / 257, (H, W, 3)).round().astype(int)) <= 1


def test_cmyk_equals_pillow():
    content = io.BytesIO()
    Image.fromarray(RGB).convert("CMYK").save(content, "JPEG", quality=95)
    expected = np.asarray(Image.open(content).convert("RGB"))
    assert difference(decode(content.getvalue()), expected) <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encode(RGB, kind, exif=exif, quality=95))
    turned = Image.fromarray(RGB)
    for operation in {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_270],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_90],
    }.get(orientation, []):
        turned = turned.transpose(operation)
    expected = np.asarray(turned)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 4  # the next orientation is off by more than 40


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "PNG 16 bit", "GIF", "palette"])
def test_transparency_lies_over_white(kind):
    alpha = np.zeros((H, W, 1), np.uint8)
    alpha[20:40] = 255
    rgba = np.concatenate([RGB, alpha], -1)
    if kind == "PNG 16 bit":
        file = png_of_16_bits(rgba.astype(int) * 257)
    elif kind in ("GIF", "palette"):
        file = encode(rgba, kind.replace("palette", "GIF"))
        if kind == "palette":
            content = io.BytesIO()
            Image.open(io.BytesIO(file)).save(content, "PNG")
            file = content.getvalue()
    else:
        file = encode(rgba, kind, lossless=True)
    image = decode(file)
    assert (image[:20] == 255).all() and (image[40:] == 255).all()
    assert np.abs(image[20:40].astype(int) - RGB[20:40]).mean() < (10 if kind in ("GIF", "palette") else 1)


def test_half_transparent_grey():
    rgba = np.full((H, W, 4), 100, np.uint8)
    assert (decode(encode(rgba, "PNG")) == round(100 * 100 / 255 + 255 * 155 / 255)).all()
    assert (decode(encode(rgba, "PNG"), channels=1) == round(100 * 100 / 255 + 255 * 155 / 255)).all()


JPEG, PNG, WEBP = encode(RGB, "JPEG", quality=95), encode(RGB, "PNG"), encode(RGB, "WEBP")


def with_bytes_changed(file, at, count=1):
    return file[:at] + bytes(byte ^ 255 for byte in file[at : at + count]) + file[at + count :]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>" * 50, "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:-2], "truncated"),
        (JPEG[:100], "truncated"),
        (JPEG[:3], "not an image"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:-12], "PNG file is damaged"),
        (with_bytes_changed(PNG, len(PNG) // 2), "damaged"),
        (WEBP[: len(WEBP) // 2], "truncated"),
        (b"GIF89a" + bytes(50), "truncated|not an image"),
        (png((60_000, 60_000, 8, 2, 0, 0, 0), bytes(1000)), "too large: .*60000"),
    ],
)
def test_rejected_with_a_reason_of_one_line(file, reason, capfd):
    image = decode(file)
    assert isinstance(image, BadSample)
    assert re.search(reason, str(image)) and "\n" not in str(image)
    assert re.fullmatch("(libpng error: .*\n)?", capfd.readouterr().err)  # libpng itself cannot be silenced


def test_bad_files_do_not_touch_their_neighbours():
    good = [encode(photo(seed, H, W), kind) for seed, kind in enumerate(["JPEG", "PNG", "WEBP"])]
    decoder = ImageDecoder(3, torch.device("cpu"), threads=1)
    images = decoder([JPEG[:-50], good[0], b"", good[1], PNG[:-20], good[2]])
    assert [isinstance(image, BadSample) for image in images] == [True, False] * 3
    for image, file in zip(images[1::2], good, strict=True):
        assert difference(np.asarray(image), decode(file)) == 0


def test_a_jpeg_damaged_inside_decodes_in_every_decoder():
    """The known limit: with its end intact nothing tells that the middle is not what was taken."""
    assert not isinstance(decode(with_bytes_changed(JPEG, len(JPEG) // 2)), BadSample)
