"""Image files other than JPEG: PNG, WebP, GIF, BMP and TIFF, read by Pillow; and what all the others are.

No parser sees a file whose first bytes are not of one of these kinds. Pillow itself would open many more: its EPS
reader runs Ghostscript.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, PngImagePlugin

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
READ = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}


def kind_of(file: bytes) -> str:
    """Pillow's name of the kind: a key of `READ`, or "WEBP". BadSample: it is something else, or empty."""
    if not file:
        raise BadSample("the image file is empty")
    for kind, magic in READ.items():
        if file.startswith(magic):
            return kind
    if file.startswith(b"WEBP", 8):
        return "WEBP"
    raise BadSample("not an image of a known kind")


def check_size(height: int, width: int) -> None:
    """Raises `BadSample` for a decompression bomb, and for what is too long and narrow to be a picture."""
    if height * width > MAX_PIXELS:
        raise BadSample(f"the image is too large: {width} x {height} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise BadSample(f"the image is a line: {width} x {height} pixels")


def open_image(file: bytes, kind: str) -> Image.Image:
    """Read the header; `decode_image` does the rest. BadSample: it cannot be read, or the image is too large."""
    try:
        if kind == "PNG":  # its checksums and its end, which Pillow does not look at while it decodes
            Image.open(io.BytesIO(file), formats=[kind]).verify()
        return Image.open(io.BytesIO(file), formats=[kind])
    except Image.DecompressionBombError as error:
        raise BadSample(f"the image is too large: {error}") from None
    except Exception as error:  # Pillow raises anything from OSError to struct.error at damaged files
        raise damaged(kind, error) from None


def decode_image(image: Image.Image, channels: int) -> tuple[np.ndarray, int]:
    """Decode an image that `open_image` opened, the first one of an animation. Other Python threads run meanwhile.

    Returns:
        (H, W, channels) uint8, 1 channel for luminance, 3 for RGB, transparency laid over white, 16 bits cut to the
        upper eight; and the EXIF orientation that is still to be applied, 1 .. 8.

    Raises:
        BadSample: it is truncated or damaged.
    """
    kind = image.format or "image"
    try:
        image.load()
        orientation = orientation_of(image)
        return _as_array(image, channels), orientation
    except BadSample:
        raise
    except Exception as error:  # see above
        raise damaged(kind, error) from None
    finally:
        image.close()  # frees the pixels, which whoever holds the opened image would keep


def orientation_of(image: Image.Image) -> int:
    """Of EXIF, 1 .. 8; 1 is upright, and stands for none."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF is no reason to lose the picture
        return 1
    return orientation if orientation in range(1, 9) else 1


def _as_array(image: Image.Image, channels: int) -> np.ndarray:
    """(H, W, channels) uint8, not turned."""
    if image.mode in TOO_DEEP:
        raise BadSample(f"the image is of {TOO_DEEP[image.mode]}, whose range is not known")
    if image.mode in GREY_16:
        deep = np.asarray(image)
        levels = (deep >> 8).astype(np.uint8)
        levels[deep == image.info.get("transparency", -1)] = 255
        return np.repeat(levels[..., None], channels, axis=-1)
    if image.has_transparency_data:
        return _over_white(image, channels)
    mode = MODES[channels]
    return np.array(image if image.mode == mode else image.convert(mode)).reshape(image.height, image.width, channels)


def _over_white(image: Image.Image, channels: int) -> np.ndarray:
    """What lies under full transparency is often black, or anything."""
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert(MODES[channels])
    return np.array(opaque).reshape(rgba.height, rgba.width, channels)


def damaged(kind: str, error: Exception) -> BadSample:
    """What Pillow says of a damaged file, in one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError) or "not identified" in reason:
        return BadSample(f"the {kind} file is truncated or damaged in its header")
    return BadSample(f"the {kind} file is truncated or damaged: {reason}")
