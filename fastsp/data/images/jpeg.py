"""JPEG files: whether they are whole, and strict decoding on the CPU by libjpeg-turbo.

Most decoders make up the pixels behind a damage. libjpeg-turbo often notices it and warns; here a warning is an error.
Warnings about header fields that no decoder uses are none: cameras write these fields wrong, and every pixel is right.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import TypeGuard

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from fastsp.data.images import library
from fastsp.data.images.files import ImageFile, as_array, decode_image
from fastsp.data.samples import BadSample

END, SOS = 0xD9, 0xDA
NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # FF 00 is a byte of data, FF D0 .. D7 a restart within it
HEADER_WARNINGS = ("JFIF revision", "SOS parameters", "Adobe color transform")
UNKNOWN_SAMPLING = "Could not determine subsampling level"  # by TurboJPEG's interface, unlike the library below it


def is_common(file: ImageFile | BadSample) -> TypeGuard[ImageFile]:
    """Whether it is a JPEG whose colours every decoder knows: grey or YCbCr."""
    if not (isinstance(file, ImageFile) and isinstance(file.image, JpegImageFile)):
        return False
    components = bytes(layer[0] for layer in file.image.layer)  # their identifiers
    stored_as_rgb = file.image.info.get("adobe_transform") == 0 or components == b"RGB"
    return len(components) in (1, 3) and not stored_as_rgb


def is_whole(jpeg: ImageFile) -> bool:
    """Whether the picture's end marker is there. Cheaper than decoding, this finds what was cut off, not what was
    damaged."""
    if jpeg.content.endswith(bytes([0xFF, END])):
        return True
    return any(marker == END for marker, _ in _markers(jpeg))  # something lies behind the end, or there is none


def _markers(jpeg: ImageFile) -> Iterator[tuple[int, int]]:
    """Behind the first scan's header: markers of tables, scans and the end, and the offset after each. None can be
    mistaken for a scan's data."""
    at = jpeg.scan
    while (found := NEXT_MARKER.search(jpeg.content, at)) is not None:
        at = found.end()
        yield jpeg.content[at - 1], at
        at += int.from_bytes(jpeg.content[at : at + 2], "big")


def decode_jpeg(jpeg: ImageFile, channels: int) -> np.ndarray:
    """Decode strictly, without turning the image upright: (H, W, channels) uint8, 1 channel for luminance, 3 for RGB.
    Other Python threads run meanwhile. BadSample: libjpeg-turbo warns, and not just of a header field."""
    components = len(jpeg.image.getbands())
    try:
        try:
            return _strictly(jpeg.content, components, channels)
        except ValueError as error:
            if not any(warning in str(error) for warning in HEADER_WARNINGS):
                raise
            return _strictly(_with_valid_header(jpeg), components, channels)
    except ValueError as error:
        raise BadSample(f"the image is truncated, damaged or of a kind of JPEG that is not read: {error}") from None


def _strictly(file: bytes, components: int, channels: int) -> np.ndarray:
    """Decode; every warning of libjpeg-turbo is a ValueError."""
    simplejpeg = library("simplejpeg")
    try:
        if components == 4:  # inverted: Adobe's programs began it, with their marker or without
            cmyk = simplejpeg.decode_jpeg(file, "CMYK")
            image = Image.frombuffer("CMYK", cmyk.shape[1::-1], cmyk.tobytes(), "raw", "CMYK;I", 0, 1)
            return as_array(image.convert("RGB"), channels)
        if channels == 1 and simplejpeg.decode_jpeg_header(file)[2] == "RGB":
            return as_array(Image.fromarray(simplejpeg.decode_jpeg(file, "RGB")), channels)
        return simplejpeg.decode_jpeg(file, "GRAY" if channels == 1 else "RGB")
    except ValueError as error:
        if UNKNOWN_SAMPLING in str(error):
            return decode_image(JpegImageFile(io.BytesIO(file)), channels)  # which is not strict
        raise


def _with_valid_header(jpeg: ImageFile) -> bytes:
    """The file with those fields set right that only make libjpeg-turbo warn, and so hide the warnings that count.

    JFIF's major version (some programs write 2); a code of Adobe's that stands for no colour transform; and a scan's
    range of coefficients, which sequential JPEGs do not use (Samsung's phones write 0 to 0 for 0 to 63).
    """
    content, info = bytearray(jpeg.content), jpeg.image.info
    if (jfif := content.find(b"JFIF\0", 0, jpeg.scan)) >= 0:
        content[jfif + 5] = 1
    if "adobe_transform" in info and (adobe := content.find(b"Adobe", 0, jpeg.scan)) >= 0:
        content[adobe + 11] = min(content[adobe + 11], 1 if len(jpeg.image.getbands()) == 3 else 2)
    if "progressive" not in info:
        scans = [at + int.from_bytes(content[at : at + 2], "big") for marker, at in _markers(jpeg) if marker == SOS]
        for end in (jpeg.scan, *scans):
            content[end - 3 : end] = b"\0\x3f\0"
    return bytes(content)
