"""Image files: their headers, and decoding by Pillow of what is not a JPEG: PNG, WebP, AVIF, GIF, BMP and TIFF.

No parser sees a file whose first bytes are not of one of these kinds. Pillow itself would open many more: its EPS
reader runs Ghostscript.
"""

from __future__ import annotations

import io
import warnings
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import AvifImagePlugin, Image, PngImagePlugin, features
from PIL.JpegImagePlugin import JpegImageFile

from fastsp.data.samples import BadSample

MAX_PIXELS = 178_956_970  # more is refused before it is decoded: what Pillow calls a decompression bomb
MAX_ASPECT = 10_000  # of the sides: at a million, the arithmetic of a random crop's place would leave 64 bits
ORIENTATION = 0x0112  # EXIF's tag
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB of text; 1 MB is less than some programs write
GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")
MODES = {1: "L", 3: "RGB"}  # by the number of channels
TOO_DEEP = {"I": "32-bit integers", "F": "floating-point numbers"}

# Of sizes from half of that on, and of damaged EXIF. Once: filters around each call would be a race between threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# By their first bytes.
KINDS = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
LATER = {"WEBP": (8, (b"WEBP",)), "AVIF": (4, (b"ftypavif", b"ftypavis"))}  # by some that follow them, from a place on
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the decoder has threads of its own


@dataclass(frozen=True)
class ImageFile:
    """A file of which the header has been read, and nothing else. Made by `open_image`."""

    content: bytes  # the whole file
    image: Image.Image  # Pillow's
    scan: int  # of a JPEG, the offset of the first scan's data

    @property
    def is_jpeg(self) -> bool:
        """Else Pillow decodes it."""
        return isinstance(self.image, JpegImageFile)


def kind_of(head: bytes) -> str | None:
    """The kind of an image file, Pillow's name of it, by its first bytes; None: it is of none that is read."""
    kinds = (kind for kind, starts in KINDS.items() if head.startswith(starts))
    later = (kind for kind, (place, marks) in LATER.items() if head.startswith(marks, place))
    return next(kinds, None) or next(later, None)


def open_image(file: bytes) -> ImageFile:
    """Read the header. BadSample: it is of no known kind, cut off or damaged, or the image is too large."""
    if not file:
        raise BadSample("the image file is empty")
    if (kind := kind_of(file)) is None:
        raise BadSample("not an image of a known kind")
    if kind == "AVIF" and not features.check("avif"):
        raise BadSample("an AVIF file, which this Pillow cannot read: install pillow 11.3 or newer")
    try:
        if kind == "PNG":  # its checksums and its end, which Pillow does not look at while it decodes
            Image.open(io.BytesIO(file), formats=[kind]).verify()
        if kind == "JPEG":  # by its class: Pillow's `open` takes some for several images
            image: Image.Image = JpegImageFile(io.BytesIO(file))
        else:
            image = Image.open(io.BytesIO(file), formats=[kind])
    except Exception as error:  # Pillow raises anything from OSError to struct.error at damaged files
        raise _damaged(kind, error) from None
    width, height = image.size
    if height * width > MAX_PIXELS:
        raise BadSample(f"the image is too large: {width} x {height} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise BadSample(f"the image is a line: {width} x {height} pixels")
    scan = image.fp.tell() if isinstance(image, JpegImageFile) and image.fp else 0
    return ImageFile(file, image, scan)


def upright_size(head: bytes) -> tuple[int, int] | None:
    """Height and width of an image as it is seen, by the file's first bytes, without decoding; None: it is no image, or
    more of the file is needed. Of a PNG, EXIF that follows the pixels is not looked at."""
    if head.startswith(b"WEBP", 8) and (size := _webp_size(head)) is not None:
        return size
    with suppress(Exception):  # see below
        if (kind := kind_of(head)) is None:
            return None
        opened = JpegImageFile if kind == "JPEG" else partial(Image.open, formats=[kind])
        with closing(opened(io.BytesIO(head))) as image:
            turned = kind != "TIFF" and "exif" in image.info and orientation_of(image) > 4  # Pillow turns TIFFs itself
            return (image.width, image.height) if turned else (image.height, image.width)
    return None


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Of a WebP file whose first chunk has the size, unless EXIF, which comes last, may turn it. Pillow wants all of
    the file. (WebP Container Specification; VP8: RFC 6386, section 9.1.)"""
    kind, data = head[12:16], head[20:30]
    if len(data) < 10:
        return None
    if kind == b"VP8X" and not data[0] & 0x08:
        return int.from_bytes(data[7:10], "little") + 1, int.from_bytes(data[4:7], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(data[8:10], "little") & 0x3FFF, int.from_bytes(data[6:8], "little") & 0x3FFF
    return None


def decode_image(image: Image.Image, channels: int) -> np.ndarray:
    """Decode an opened image, the first one of an animation, not turned. Other Python threads run meanwhile.

    (H, W, channels) uint8, 1 channel for luminance, 3 for RGB, transparency laid over white, 16 bits cut to the upper
    eight. Raises BadSample if it is truncated or damaged.
    """
    try:
        image.load()
        return as_array(image, channels)
    except BadSample:
        raise
    except Exception as error:  # see above
        raise _damaged(image.format or "image", error) from None


def orientation_of(image: Image.Image) -> int:
    """Of EXIF, 1 .. 8; 1 is upright, and stands for none. Of a loaded image, unless it is a JPEG."""
    if image.format == "JPEG" and "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF is no reason to lose the picture
        return 1
    return orientation if orientation in range(1, 9) else 1


def as_array(image: Image.Image, channels: int) -> np.ndarray:
    """(H, W, channels) uint8, not turned."""
    if image.mode in TOO_DEEP:
        raise BadSample(f"the image is of {TOO_DEEP[image.mode]}, whose range is not known")
    if image.mode in GREY_16:
        deep = np.asarray(image)
        levels = (deep >> 8).astype(np.uint8)
        levels[deep == image.info.get("transparency", -1)] = 255
        return np.repeat(levels[..., None], channels, axis=-1)
    if image.has_transparency_data:  # under which there is often black, or anything
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.array(image.convert(MODES[channels])).reshape(image.height, image.width, channels)


def _damaged(kind: str, error: Exception) -> BadSample:
    """What Pillow says of a file, in one line."""
    if isinstance(error, Image.DecompressionBombError):
        return BadSample(f"the image is too large: {error}")
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError) or "not identified" in reason:
        return BadSample(f"the {kind} file is truncated or damaged in its header")
    return BadSample(f"the {kind} file is truncated or damaged: {reason}")
