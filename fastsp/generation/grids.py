"""Tensors to pictures: single images, and grids with titles and captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fastsp.generation.lettering import font_for, one_line, wrap
from fastsp.utils.files import new_file

MAX_PIXELS = 2**26  # of a grid: 200 MB in memory
TRAJECTORY_FRAMES = 50  # columns of a grid that shows x0^ on the way of the sampler
TRAJECTORY_SIDE = 192  # pixels of its cells
_MARGIN = 2
_PAPER = (255,) * 3
_INK = (40,) * 3
_LINE = 1.25  # height of a line of text, in sizes of its font
_MAX_ROW_TITLE = 260  # pixels


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1] -> PIL images, grey for one channel, else RGB."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    grey = pixels.shape[1] == 1
    return [Image.fromarray((p[0] if grey else p.permute(1, 2, 0)).numpy()) for p in pixels]


def cell_side(side: int, count: int, max_pixels: int = MAX_PIXELS) -> int:
    """The side in pixels of ``count`` square images, made with ``side``, in a grid of at most ``max_pixels``."""
    return max(1, min(side, math.isqrt(max_pixels // count)))


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """An image of at most ``side`` pixels in width and height."""
    if max(picture.size) <= side:
        return picture
    return ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS)


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
        images: (N, C, H, W) in [-1, 1], or PIL images. They are shrunk where all cells together would have more than
            ``MAX_PIXELS``.
        columns: None for a nearly square grid.
        row_titles: one for each row, at its left.
        column_titles: one for each column, above it.
        captions: one for each image, below it.
        min_size: pixels of a cell's side; smaller images are enlarged by a whole factor, without smoothing.
    """
    images = to_pil(images) if isinstance(images, Tensor) else images
    pictures = [_sized(picture.convert("RGB"), min_size, math.isqrt(MAX_PIXELS // len(images))) for picture in images]
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    size = min(max(13, width // 28), 20)
    above = _Texts(column_titles, width, size, max_lines=3)
    below = _Texts(captions, width, size, max_lines=3)
    beside = _Texts(row_titles, _MAX_ROW_TITLE, size, max_lines=max(1, int(height / size / _LINE)))
    left, top = _MARGIN + beside.width, _MARGIN + above.height
    cell = width + _MARGIN, height + below.height + _MARGIN
    canvas = Image.new("RGB", (left + columns * cell[0], top + rows * cell[1]), _PAPER)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        place = left + column * cell[0], top + row * cell[1]
        canvas.paste(picture, place)
        below.draw(canvas, index, (place[0], place[1] + height))
    for row in range(len(row_titles or ())):
        middle = (height - beside.text_height(row)) // 2
        beside.draw(canvas, row, (_MARGIN, top + row * cell[1] + max(0, middle)))
    for column in range(len(column_titles or ())):
        above.draw(canvas, column, (left + column * cell[0], _MARGIN))
    return canvas


def save_png(picture: Image.Image, path: Path, **metadata: str) -> None:
    """Write a PNG whole or not at all; ``metadata`` goes into its text chunks, as UTF-8."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value.encode("utf-8", "replace").decode("utf-8").replace("\0", ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        picture.save(unfinished, format="PNG", pnginfo=info)


class _Texts:
    """Wrapped texts of one kind, and the room that they take: ``height`` of the highest, ``width`` of the widest."""

    def __init__(self, texts: Sequence[str] | None, width: int, size: int, max_lines: int) -> None:
        self._line = round(size * _LINE)
        self._fonts = [font_for(one_line(text), size) for text in texts or ()]
        self._lines = [
            wrap(text, width - 4, font, max_lines) for text, font in zip(texts or (), self._fonts, strict=True)
        ]
        lengths = [font.getlength(line) for lines, font in zip(self._lines, self._fonts, strict=True) for line in lines]
        self.height = max((self.text_height(index) for index in range(len(self._lines))), default=0)
        self.width = math.ceil(max(lengths)) + 10 if lengths else 0

    def text_height(self, index: int) -> int:
        return len(self._lines[index]) * self._line + 4 if self._lines[index] else 0

    def draw(self, canvas: Image.Image, index: int, place: tuple[int, int]) -> None:
        for number, line in enumerate(self._lines[index] if self._lines else ()):
            at = place[0] + 2, place[1] + number * self._line + 1
            ImageDraw.Draw(canvas).text(at, line, fill=_INK, font=self._fonts[index])


def _sized(picture: Image.Image, at_least: int, at_most: int) -> Image.Image:
    picture = shrunk(picture, at_most)
    scale = min(math.ceil(at_least / picture.width), at_most // max(picture.size))
    return picture if scale <= 1 else ImageOps.scale(picture, scale, Image.Resampling.NEAREST)
