"""JPEG files: what their header says, whether they are whole, and their strict decoding on the CPU by libjpeg-turbo.

Most decoders take a JPEG that is damaged inside, and make up the pixels from the damage on. libjpeg-turbo often notices
(codes and lengths stop fitting) and says so in a warning; here a warning is an error.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fastsp.data.libraries import library
from fastsp.data.samples import BadSample

START, END, EXIF = b"\xff\xd8", b"\xff\xd9", b"Exif\0\0"
SOS, APP1, APP14 = 0xDA, 0xE1, 0xEE
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 .. SOF15; the others are tables
WITHOUT_LENGTH = frozenset([0x01, *range(0xD0, 0xD8)])
NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # FF 00 is a byte of data, FF D0 .. D7 a restart within it
ORIENTATION = 0x0112
UNKNOWN_SAMPLING = "Could not determine subsampling level"


@dataclass(frozen=True)
class JpegFile:
    """A JPEG file whose header has been read, up to the first scan. Made by `read_jpeg`."""

    content: bytes
    """The whole file."""
    height: int
    """In pixels, as stored: before the orientation is applied."""
    width: int
    process: int
    """0 baseline, 1 extended, 2 progressive, ...: the n of the SOFn marker."""
    precision: int
    """Bits per sample: 8, in nearly all."""
    components: bytes
    """Their identifiers: one for grey, three for colour, four for print."""
    adobe_transform: int | None
    """Of an Adobe marker: 0 says that the components are RGB or CMYK, not YCbCr or YCCK."""
    orientation: int
    """Of EXIF, 1 .. 8: see `fastsp.data.orientation`."""
    scan: int
    """Offset of the first scan's marker."""

    @property
    def is_common(self) -> bool:
        """Whether every decoder knows it: grey or YCbCr, 8 bits, Huffman-coded, baseline or progressive."""
        stored_as_rgb = self.adobe_transform == 0 or self.components == b"RGB"
        return self.process <= 2 and self.precision == 8 and len(self.components) in (1, 3) and not stored_as_rgb

    def is_whole(self) -> bool:
        """Whether the picture's end marker is there, which nothing inside its data can be mistaken for.

        Cheaper than decoding, it finds what was cut off, not what was damaged.
        """
        if self.content.endswith(END):
            return True
        at = self.scan  # something lies behind the end, or there is none: go from marker to marker
        while (found := NEXT_MARKER.search(self.content, at)) is not None:
            at = found.end()
            if self.content[at - 1] == END[1]:
                return True
            at += int.from_bytes(self.content[at : at + 2], "big")  # tables and headers between scans
        return False


def read_jpeg(file: bytes) -> JpegFile:
    """Read the header.

    Raises:
        BadSample: it is cut off or damaged.
    """
    at = len(START)
    frame: dict[str, Any] = {}
    adobe_transform = orientation = None
    while True:
        start = at
        marker, at, content = _segment(file, at)
        if marker in FRAMES:
            frame = _frame(content) | {"process": marker - 0xC0}
        elif marker == APP1 and content.startswith(EXIF):
            orientation = orientation or exif_orientation(content[len(EXIF) :])
        elif marker == APP14 and content.startswith(b"Adobe") and len(content) >= 12:
            adobe_transform = content[11]
        elif marker == SOS and frame:
            return JpegFile(file, **frame, adobe_transform=adobe_transform, orientation=orientation or 1, scan=start)
        elif marker in (SOS, END[1]):
            raise BadSample("the JPEG file is damaged: it has no picture")


def _segment(file: bytes, at: int) -> tuple[int, int, bytes]:
    """The segment at an offset: its marker, the offset after it, its content."""
    while file[at : at + 2] == b"\xff\xff":  # fill bytes
        at += 1
    if len(file) < at + 4:
        raise BadSample("the image is truncated: the JPEG file ends in its header")
    start, marker, length = struct.unpack_from(">BBH", file, at)
    if marker in WITHOUT_LENGTH or marker == END[1]:
        return marker, at + 2, b""
    if start != 0xFF or marker == 0 or length < 2:
        raise BadSample("the JPEG file is damaged in its header")
    return marker, at + 2 + length, file[at + 4 : at + 2 + length]


def _frame(content: bytes) -> dict[str, Any]:
    """What a SOF segment says."""
    if len(content) < 6 or len(content) < 6 + 3 * content[5]:
        raise BadSample("the JPEG file is damaged in its header")
    precision, height, width, count = struct.unpack_from(">BHHB", content)
    if not height or not width:
        raise BadSample(f"the JPEG file is damaged: its header says {width} x {height} pixels")
    identifiers = content[6 : 6 + 3 * count : 3]
    return {"precision": precision, "height": height, "width": width, "components": identifiers}


def exif_orientation(exif: bytes) -> int:
    """The orientation in an EXIF block (a TIFF header and its directories), 1 .. 8; 1 where there is none."""
    try:
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, directory)
        for entry in range(entries):
            tag, kind, _, short = struct.unpack_from(f"{order}HHIH", exif, directory + 2 + 12 * entry)
            if tag == ORIENTATION:
                return short if kind == 3 and 1 <= short <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1


def decode_jpeg(jpeg: JpegFile, channels: int) -> np.ndarray:
    """Decode strictly, without turning the image upright. Other Python threads run meanwhile.

    Args:
        jpeg: the file.
        channels: 1 for luminance, 3 for RGB.

    Returns:
        (H, W, channels) uint8.

    Raises:
        BadSample: libjpeg-turbo has an error or a warning to report.
    """
    simplejpeg = library("simplejpeg")

    file = jpeg.content
    try:
        if len(jpeg.components) == 4:
            return _from_print(simplejpeg.decode_jpeg(file, "CMYK"), channels)
        if channels == 1 and simplejpeg.decode_jpeg_header(file)[2] == "RGB":
            rgb = Image.fromarray(simplejpeg.decode_jpeg(file, "RGB"))
            return np.array(rgb.convert("L"))[..., None]
        return simplejpeg.decode_jpeg(file, "GRAY" if channels == 1 else "RGB")
    except ValueError as error:
        if UNKNOWN_SAMPLING in str(error):
            return _with_pillow(file, channels)
        if "Unsupported JPEG" in str(error):
            raise BadSample(f"a kind of JPEG that is not read: {error}") from None
        kind = "truncated" if "Premature end" in str(error) else "damaged"
        raise BadSample(f"the image is {kind}: {error}") from None


def _from_print(cmyk: np.ndarray, channels: int) -> np.ndarray:
    """From (H, W, 4), which in a JPEG is inverted: Adobe's programs began it, with their marker or without."""
    height, width, _ = cmyk.shape
    image = Image.frombuffer("CMYK", (width, height), cmyk.tobytes(), "raw", "CMYK;I", 0, 1).convert("RGB")
    return np.array(image.convert("L") if channels == 1 else image).reshape(height, width, channels)


def _with_pillow(file: bytes, channels: int) -> np.ndarray:
    """For sampling factors that TurboJPEG's interface, unlike the library below it, does not know. Not strict."""
    try:
        with Image.open(io.BytesIO(file), formats=["JPEG", "MPO"]) as image:
            return np.array(image.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, -1)
    except Exception as error:  # Pillow raises anything from OSError to struct.error at damaged files
        raise BadSample(f"the image is truncated or damaged: {error}") from None
