"""Image files of every kind: what they decode to, and why bad ones are rejected."""

import io
import random
import re
import struct
import subprocess
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from data.helpers import encode, photo
from PIL import Image, ImageOps

from fastsp.data.images.decode import ImageDecoder, JpegsOnGpu, default_threads
from fastsp.data.images.files import ORIENTATION, open_image, upright_size
from fastsp.data.images.jpeg import is_whole
from fastsp.data.samples import BadSample

H, W = 60, 90
RGB = photo(0, H, W)


def decode(file, channels=3):
    (image,) = ImageDecoder(channels, torch.device("cpu"), threads=1)([file])
    return image if isinstance(image, BadSample) else np.asarray(image)


def difference(image, expected):
    assert image.shape == expected.shape and image.dtype == np.uint8
    return np.abs(image.astype(int) - expected).max()


def png(header: tuple, rows: bytes, **before: bytes) -> bytes:
    """`before`: further chunks, by their kind."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    ihdr = struct.pack(">IIBBBBB", *header)
    others = b"".join(chunk(kind.encode(), content) for kind, content in before.items())
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + others + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png((width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0), rows)


def with_pillow(file, channels=3):
    """Upright and over white: the reference."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGBA")
    opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(opaque.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)


def test_lossless_kinds():
    for file in (encode(RGB, "PNG"), encode(RGB, "BMP"), encode(RGB, "TIFF"), encode(RGB, "WEBP", lossless=True)):
        assert difference(decode(file), RGB) == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:1:1"},
        {"subsampling": "4:1:1", "progressive": True},
        {"restart_marker_blocks": 2},
        {"keep_rgb": True},
    ],
)
@pytest.mark.parametrize("size", [(60, 90), (61, 35), (1, 1), (1, 50)])
def test_jpeg_equals_pillow(options, size):
    file = encode(photo(0, *size).reshape(*size, 3), "JPEG", quality=85, **options)
    assert difference(decode(file), with_pillow(file)) == 0
    assert difference(decode(file, channels=1), with_pillow(file, channels=1)) <= 1
    grey = encode(photo(0, *size, channels=1).reshape(size), "JPEG", progressive="progressive" in options)
    assert difference(decode(grey), with_pillow(grey)) == 0 == difference(decode(grey, 1), with_pillow(grey, 1))


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


def test_a_transparent_level_of_16_bits_is_white():
    deep = np.array([[[0], [256], [257], [60_000]]])
    rows = b"\0" + deep.astype(">u2").tobytes()
    file = png((4, 1, 16, 0, 0, 0, 0), rows, tRNS=struct.pack(">H", 257))
    assert np.asarray(decode(file, 1)).ravel().tolist() == [0, 1, 255, 60_000 >> 8]


def test_a_picture_with_much_text_is_no_bad_one():
    """Some programs write the settings that made a picture into it, megabytes of them."""
    text = b"workflow\0\0" + zlib.compress(b"x" * (20 << 20))
    file = png((1, 1, 8, 0, 0, 0, 0), b"\0\x07", zTXt=text)
    assert np.asarray(decode(file, 1)).ravel().tolist() == [7]


def save(image: Image.Image, kind: str, orientation: int | None = None, **options) -> bytes:
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif.tobytes()
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["Adobe's CMYK", "YCCK", "no Adobe marker"])
def test_print_colours_equal_pillow(kind):
    file = bytearray(save(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95))
    adobe = file.index(b"Adobe")
    if kind == "YCCK":
        file[adobe + 11] = 2
    elif kind == "no Adobe marker":
        file[adobe : adobe + 5] = b"Xdobe"
    file = bytes(file)
    for channels in (1, 3):
        assert difference(decode(file, channels), with_pillow(file, channels)) <= 1
    assert isinstance(decode(file[:-50]), BadSample)


def picture(mode: str, height: int = H, width: int = W) -> Image.Image:
    """With a ramp as its alpha channel, where it has one, and as its palette's index where it has one."""
    colour = Image.fromarray(photo(0, height, width))
    alpha = Image.fromarray(np.linspace(0, 255, height * width).reshape(height, width).astype(np.uint8))
    if mode == "RGBA":
        colour.putalpha(alpha)
        return colour
    if mode == "LA":
        return Image.merge("LA", (colour.convert("L"), alpha))
    return colour.quantize(16) if mode == "P" else colour.convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(60, 90), (90, 60), (80, 20)])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGBA", {}),
        ("LA", {}),
        ("P", {}),
        ("P", {"bits": 4}),
        ("P", {"transparency": 3}),
        ("P", {"transparency": bytes(range(0, 256, 16))}),
        ("L", {}),
        ("L", {"transparency": 100}),
        ("RGB", {"transparency": tuple(RGB[0, 0].tolist())}),
        ("1", {}),
    ],
)
def test_png_equals_pillow(mode, options, size, orientation):
    file = save(picture(mode, *size), "PNG", orientation, **options)
    for channels in (1, 3):
        assert difference(decode(file, channels), with_pillow(file, channels)) == 0


@pytest.mark.parametrize(
    ("kind", "modes"),
    [
        ("TIFF", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "YCbCr"]),
        ("WEBP", ["RGB", "RGBA", "LA", "L", "P"]),
        ("BMP", ["RGB", "RGBA", "L", "P", "1"]),
        ("GIF", ["RGB", "RGBA", "L", "P", "1"]),
    ],
)
def test_the_other_kinds_equal_pillow(kind, modes):
    for mode in modes:
        for orientation in (1, 3, 6, 8) if kind in ("TIFF", "WEBP") else (None,):
            file = save(picture(mode), kind, orientation)
            assert difference(decode(file), with_pillow(file)) == 0


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
AVIF = encode(RGB, "AVIF")


def with_bytes_changed(file, at, count=1):
    return file[:at] + bytes(byte ^ 255 for byte in file[at : at + count]) + file[at + count :]


def jpeg_that_says(height, width):
    """A bomb: little data, and a header of many pixels."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>" * 50, "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:-2], "truncated"),
        (JPEG[:100], "truncated"),
        (JPEG[:2], "not an image"),
        (JPEG[:3], "the JPEG file is truncated or damaged in its header"),
        (JPEG[:200] + b"<html>" * 100, "damaged"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:-12], "truncated"),
        (with_bytes_changed(PNG, len(PNG) // 2), "damaged"),
        (WEBP[: len(WEBP) // 2], "truncated"),
        (b"GIF89a" + bytes(50), "truncated"),
        (png((60_000, 60_000, 8, 2, 0, 0, 0), bytes(1000)), "too large: .*60000"),
        (save(Image.new("L", (1, 10_001)), "PNG"), "a line: 1 x 10001 pixels"),
        (jpeg_that_says(65_000, 65_000), "too large: 65000 x 65000"),
        (png((100, 100, 8, 2, 0, 0, 0), bytes(1000)), "truncated"),
        (AVIF[: len(AVIF) // 2], "the AVIF file is truncated or damaged"),
        (AVIF[:200], "the AVIF file is truncated or damaged"),
        (AVIF.replace(b"ftypavif", b"ftypheic"), "not an image of a known kind"),
        (save(Image.fromarray(RGB), "JPEG2000"), "not an image of a known kind"),
        (save(Image.fromarray(RGB), "PPM"), "not an image of a known kind"),
        (save(Image.fromarray(RGB[..., 0].astype(np.float32)), "TIFF"), "floating-point"),
    ],
)
def test_rejected_with_a_reason_of_one_line(file, reason, capfd):
    image = decode(file)
    assert isinstance(image, BadSample)
    assert re.search(reason, str(image)) and "\n" not in str(image)
    assert not capfd.readouterr().err


def test_avif():
    """As Pillow reads it, transparency over white, upright, at once by its header; damage is found or refused."""
    assert difference(decode(AVIF), np.asarray(Image.open(io.BytesIO(AVIF)))) == 0
    clear = Image.new("RGBA", (20, 30), (10, 20, 30, 0))
    assert (np.asarray(decode(save(clear, "AVIF", quality=100))) >= 254).all()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = save(Image.fromarray(RGB), "AVIF", quality=100, exif=exif)
    assert np.abs(np.asarray(decode(turned)).astype(int) - np.rot90(RGB, -1)).mean() < 5  # chroma is subsampled
    assert upright_size(turned) == (RGB.shape[1], RGB.shape[0]) and upright_size(AVIF) == RGB.shape[:2]


def test_a_pillow_without_avif(monkeypatch):
    monkeypatch.setattr("fastsp.data.images.files.features.check", lambda name: False)
    assert "this Pillow cannot read" in str(decode(AVIF))


def test_bad_files_do_not_touch_their_neighbours():
    good = [encode(photo(seed, H, W), kind) for seed, kind in enumerate(["JPEG", "PNG", "WEBP"])]
    decoder = ImageDecoder(3, torch.device("cpu"), threads=1)
    images = decoder([JPEG[:-50], good[0], b"", good[1], PNG[:-20], good[2]])
    assert [isinstance(image, BadSample) for image in images] == [True, False] * 3
    for image, file in zip(images[1::2], good, strict=True):
        assert difference(np.asarray(image), decode(file)) == 0


def test_no_parser_but_the_documented_ones_sees_a_file(monkeypatch):
    """Pillow's EPS reader would run Ghostscript."""
    files = [save(picture("RGB"), kind) for kind in ("EPS", "JPEG2000", "PPM", "ICO")]
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow was asked"))
    assert all(isinstance(decode(file), BadSample) for file in files)


def damaged_inside(count):
    """JPEGs of several kinds with one byte to a few hundred changed in their data, their ends intact."""
    rnd = random.Random(0)
    for index in range(count):
        options = [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"restart_marker_blocks": 4}][index % 4]
        file = bytearray(encode(photo(index, 64, 80, channels=1 + 2 * (index % 3 > 0)), "JPEG", quality=90, **options))
        length = rnd.choice([1, 1, 16, 300])
        at = rnd.randrange(open_image(bytes(file)).scan + 20, len(file) - 2 - length)
        file[at : at + length] = rnd.randbytes(length)
        yield bytes(file)


def test_exactly_those_are_rejected_that_strict_libjpeg_turbo_rejects():
    """Of a hundred that other decoders take, most with wrong pixels from the damage on."""
    files = list(damaged_inside(100))
    images = ImageDecoder(3, torch.device("cpu"), threads=2)(files)
    rejected = 0
    for image, file in zip(images, files, strict=True):
        try:
            expected = simplejpeg.decode_jpeg(file, strict=True)
        except ValueError as error:
            assert isinstance(image, BadSample) and str(error) in str(image)
            rejected += 1
        else:
            assert difference(np.asarray(image), expected) == 0
    assert 30 < rejected < 100


def header_end(file):
    """Offset of the first scan's data."""
    scan = file.index(b"\xff\xda")
    return scan + 2 + int.from_bytes(file[scan + 2 : scan + 4], "big")


def with_bytes(file, at, content):
    return file[:at] + content + file[at + len(content) :]


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["Samsung", "JFIF 2.01", "Adobe", "all"])
def test_odd_header_fields_are_no_damage(kind, channels, subsampling):
    """Cameras and programs write them; Pillow reads the same pixels with them and without."""
    file = whole = encode(RGB, "JPEG", quality=90, subsampling=subsampling)
    if kind in ("Samsung", "all"):
        file = with_bytes(file, header_end(file) - 2, b"\0")  # the last coefficient of the scan: 0, not 63
    if kind in ("JFIF 2.01", "all"):
        file = with_bytes(file, file.index(b"JFIF\0") + 5, b"\2\1")
    if kind == "Adobe":  # which is looked at where there is no JFIF
        file = file[:20].replace(b"JFIF", b"XFIF") + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\7" + file[20:]
    assert difference(with_pillow(file, channels), with_pillow(whole, channels)) == 0
    assert difference(decode(file, channels), decode(whole, channels)) == 0
    with pytest.raises(ValueError, match=r"JFIF|SOS|Adobe"):
        simplejpeg.decode_jpeg(file)
    rnd, rejected = random.Random(0), 0
    for _ in range(20):  # decoding stays as strict as without them
        behind, junk = rnd.randrange(60, len(whole) - header_end(whole)), rnd.randbytes(40)
        expected = decode(with_bytes(whole, len(whole) - behind, junk), channels)
        found = decode(with_bytes(file, len(file) - behind, junk), channels)
        assert isinstance(found, BadSample) == isinstance(expected, BadSample)
        rejected += isinstance(found, BadSample)
    assert rejected > 5 and isinstance(decode(file[:-50], channels), BadSample)


def test_damage_that_no_decoder_finds():
    """The known limit: scans of a progressive file that are missing, or data in which every code still fits."""
    file = encode(RGB, "JPEG", quality=95, progressive=True)
    second_scan = file.index(b"\xff\xda", file.index(b"\xff\xda") + 2)
    assert not isinstance(decode(file[:second_scan] + b"\xff\xd9"), BadSample)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_a_jpeg_that_was_cut_off_has_no_end(options):
    """What is looked for before a GPU decodes: at any length, and with anything behind it."""
    thumbnail = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + encode(RGB[:20, :20], "JPEG")
    file = encode(RGB, "JPEG", quality=90, exif=thumbnail, **options)
    scan = open_image(file).scan
    assert all(is_whole(open_image(whole)) for whole in (file, file + bytes(100), file + file))
    for length in range(scan + 20, len(file)):
        assert not is_whole(open_image(file[:length]))
    assert not any(is_whole(open_image(file[:-2] + junk)) for junk in (bytes(1000), b"\xff" * 9, b"\xff\0"))
    erased = file[:-2] + b"\xff" * 2_000_000 + b"\0"  # as flash memory is; looked at once, not from every byte anew
    assert not is_whole(open_image(erased)) and is_whole(open_image(erased + b"\xff\xff\xd9" + bytes(9)))


class GpuThatFailsBatches(JpegsOnGpu):
    """Stands for a decoder in hardware: one status for a whole batch, and one kind of JPEG that it does not know."""

    def __init__(self):
        self.batches = []

    def _decode(self, images):
        self.batches.append([image.content for image in images])
        fails = any(image.content == UNKNOWN_TO_GPU or image.content in CORRUPT for image in images)
        return [None if fails else torch.full((1, 1, 3), 7, dtype=torch.uint8) for _ in images]


UNKNOWN_TO_GPU = encode(photo(5, H, W), "JPEG", subsampling="4:1:1")
CORRUPT = [with_bytes_changed(JPEG, len(JPEG) // 2, 300)]


def test_what_a_gpu_rejects_is_decoded_alone_and_then_by_the_cpu():
    decoder = ImageDecoder(3, torch.device("cpu"), threads=1)
    decoder.gpu = GpuThatFailsBatches()
    cmyk = save(Image.fromarray(RGB).convert("CMYK"), "JPEG")
    files = [JPEG, UNKNOWN_TO_GPU, JPEG[:-50], PNG, CORRUPT[0], cmyk, b""]
    images = decoder(files)
    whole = [JPEG, UNKNOWN_TO_GPU, CORRUPT[0]]
    assert decoder.gpu.batches == [whole, *([file] for file in whole)]  # what was cut off, and print, never come near
    assert (np.asarray(images[0]) == 7).all()
    assert difference(np.asarray(images[1]), with_pillow(UNKNOWN_TO_GPU)) == 0
    assert difference(np.asarray(images[3]), RGB) == 0 == difference(np.asarray(images[5]), with_pillow(cmyk))
    reasons = {row: str(image) for row, image in enumerate(images) if isinstance(image, BadSample)}
    assert list(reasons) == [2, 4, 6]
    assert "no end" in reasons[2] and "truncated, damaged or of" in reasons[4] and "empty" in reasons[6]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF
def test_headers_of_any_bytes_end_in_an_image_or_a_rejection():
    rnd = random.Random(1)
    decoder = ImageDecoder(3, torch.device("cpu"), threads=1)
    modes = {"JPEG": "RGB", "PNG": "RGBA", "WEBP": "RGB", "TIFF": "RGB", "GIF": "P", "BMP": "L"}
    for kind, mode in modes.items():
        file = save(picture(mode), kind, None if kind in ("GIF", "BMP") else 6)
        for _ in range(60):
            changed = bytearray(file)
            for _ in range(rnd.choice([1, 2, 8])):
                changed[rnd.randrange(min(len(changed), 200))] = rnd.choice([0, 255, 127, rnd.randrange(256)])
            assert len(decoder([bytes(changed), bytes(changed[: rnd.randrange(len(changed))])])) == 2


def test_cores_are_shared_among_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    for processes, threads in (("1", 16), ("8", 2), ("32", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert default_threads() == threads
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert default_threads() == 16
