"""Tensors to pictures: single images, and grids with titles and captions in any script that a font covers."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fastsp.utils.files import new_file

MAX_PIXELS = 2**26  # of a grid: 200 MB in memory
TRAJECTORY_FRAMES, TRAJECTORY_SIDE = 50, 192  # columns of a grid that shows x0^ on the way, pixels of its cells
_MARGIN = 2
_PAPER, _INK = (255,) * 3, (40,) * 3
_LINE = 1.25  # height of a line of text, in sizes of its font
_MAX_ROW_TITLE = 260  # pixels


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1] -> PIL images, grey for one channel, else RGB."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    grey = pixels.shape[1] == 1
    return [Image.fromarray((p[0] if grey else p.permute(1, 2, 0)).numpy()) for p in pixels]


def cell_side(side: int, count: int, max_pixels: int = MAX_PIXELS) -> int:
    """The longest side in pixels of ``count`` images, made with ``side``, in a grid of at most ``max_pixels``."""
    return max(1, min(side, math.isqrt(max_pixels // count)))


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """An image of at most ``side`` pixels in width and height."""
    return picture if max(picture.size) <= side else ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS)


def grid(
    images: Tensor | Sequence[Image.Image],
    columns: int | None = None,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    min_size: int = 48,
) -> Image.Image:
    """A grid of images of one size, row by row. Titles and captions are wrapped, and clipped where there is no room.

    Args:
        images: (N, C, H, W) in [-1, 1], or PIL images; shrunk where all cells would have more than ``MAX_PIXELS``.
        columns: None for a nearly square grid.
        row_titles, column_titles, captions: one for each row, at its left; column, above it; image, below it.
        min_size: pixels of a cell's side; smaller images are enlarged by a whole factor, without smoothing.
    """
    images = to_pil(images) if isinstance(images, Tensor) else images
    pictures = [_sized(picture.convert("RGB"), min_size, math.isqrt(MAX_PIXELS // len(images))) for picture in images]
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    size = min(max(13, width // 28), 20)
    above, below = (_lettered(texts or (), width, size, max_lines=3) for texts in (column_titles, captions))
    beside = _lettered(row_titles or (), _MAX_ROW_TITLE, size, max_lines=max(1, int(height / size / _LINE)))
    left = _MARGIN + max((text.width + 6 for text in beside), default=0)
    top = _MARGIN + max((text.height for text in above), default=0)
    cell = width + _MARGIN, height + max((text.height for text in below), default=0) + _MARGIN
    canvas = Image.new("RGB", (left + columns * cell[0], top + rows * cell[1]), _PAPER)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        place = left + column * cell[0], top + row * cell[1]
        canvas.paste(picture, place)
        if below:
            canvas.paste(below[index], (place[0], place[1] + height))
    for row, text in enumerate(beside):
        canvas.paste(text, (_MARGIN, top + row * cell[1] + max(0, (height - text.height) // 2)))
    for column, text in enumerate(above):
        canvas.paste(text, (left + column * cell[0], _MARGIN))
    return canvas


def _lettered(texts: Sequence[str], width: int, size: int, max_lines: int) -> list[Image.Image]:
    """Each text, wrapped, as a picture that is as large as it needs."""
    pictures, line_height = [], round(size * _LINE)
    for text in texts:
        font = font_for(one_line(text), size)
        lines = wrap(text, width - 4, font, max_lines)
        longest = math.ceil(max(map(font.getlength, lines), default=0))
        pictures.append(Image.new("RGB", (longest + 4, len(lines) * line_height + 4 * bool(lines)), _PAPER))
        for number, line in enumerate(lines):
            ImageDraw.Draw(pictures[-1]).text((2, number * line_height + 1), line, fill=_INK, font=font)
    return pictures


def save_png(picture: Image.Image, path: Path, **metadata: str) -> None:
    """Write a PNG whole or not at all; ``metadata`` goes into its text chunks, as UTF-8."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value.encode("utf-8", "replace").decode("utf-8").replace("\0", ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        picture.save(unfinished, format="PNG", pnginfo=info)


def _sized(picture: Image.Image, at_least: int, at_most: int) -> Image.Image:
    picture = shrunk(picture, at_most)
    scale = min(math.ceil(at_least / picture.width), at_most // max(picture.size))
    return picture if scale <= 1 else ImageOps.scale(picture, scale, Image.Resampling.NEAREST)


def one_line(text: str) -> str:
    """``text`` as one line of visible characters: no control characters, no direction overrides, single spaces."""
    whole = text.encode("utf-8", "replace").decode("utf-8")  # arguments that were not UTF-8 have lone surrogates
    visible = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in whole)
    kept = (c for c in visible if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn"))
    return " ".join("".join(kept).split())


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The font with most of the characters of ``text``: DejaVu Sans, or an installed font where that lacks some."""
    from matplotlib import get_data_path

    characters = frozenset(ord(c) for c in text if not c.isspace())
    # Latin, Greek, Cyrillic, Arabic, Hebrew and many signs
    best = str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    if characters - _characters(best):
        best = min((best, *_system_fonts()), key=lambda font: len(characters - _characters(font)))
    return ImageFont.truetype(best, size)


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont, max_lines: int) -> list[str]:
    """``text`` in at most ``max_lines`` lines of ``width`` pixels; an ellipsis ends what does not fit."""
    most = max(1, int(width) // 3)  # characters of a line: the narrowest have some three pixels
    rest, lines = one_line(text)[: most * max_lines + 1], []
    for characters in range(most, 0, -1):
        lines = textwrap.wrap(rest, characters)
        if len(lines) > max_lines:
            lines[max_lines - 1 :] = [lines[max_lines - 1][: max(1, characters - 1)].rstrip() + "…"]
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines


@cache
def _system_fonts() -> tuple[str, ...]:
    from matplotlib.font_manager import findSystemFonts

    return tuple(sorted(findSystemFonts()))


@cache
def _characters(font: str) -> frozenset[int]:
    """The code points that a font file has; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
