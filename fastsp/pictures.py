"""Tensors to pictures: single images, and captioned grids."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fastsp.files import new_file

_MARGIN = 2
_PAPER = 255
_INK = 40


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1] -> PIL images, grey for one channel, else RGB."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    grey = pixels.shape[1] == 1
    return [Image.fromarray((p[0] if grey else p.permute(1, 2, 0)).numpy()) for p in pixels]


def grid(
    images: Tensor,
    columns: int | None = None,
    row_titles: list[str] | None = None,
    column_titles: list[str] | None = None,
    min_size: int = 48,
) -> Image.Image:
    """A grid of images, small ones enlarged to at least ``min_size`` pixels without smoothing.

    Args:
        images: (N, C, H, W) in [-1, 1], row by row.
        columns: None for a nearly square grid.
        row_titles: one for each row, at its left.
        column_titles: one for each column, above it.
        min_size: pixels of a cell's side.
    """
    pictures = [picture.convert("RGB") for picture in to_pil(images)]
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    scale = max(1, math.ceil(min_size / pictures[0].width))
    width, height = (side * scale + _MARGIN for side in pictures[0].size)
    font = ImageFont.load_default(13)
    left = _MARGIN + max((round(font.getlength(title)) + 10 for title in row_titles or []), default=0)
    top = _MARGIN + (20 if column_titles else 0)
    canvas = Image.new("RGB", (left + columns * width, top + rows * height), (_PAPER,) * 3)
    draw = ImageDraw.Draw(canvas)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        cell = picture.resize((width - _MARGIN, height - _MARGIN), Image.Resampling.NEAREST)
        canvas.paste(cell, (left + column * width, top + row * height))
    for row, title in enumerate(row_titles or []):
        draw.text((4, top + row * height + height // 2 - 8), title, fill=(_INK,) * 3, font=font)
    for column, title in enumerate(column_titles or []):
        clipped = _clip(title, width - 4, font)
        draw.text((left + column * width + 2, 2), clipped, fill=(_INK,) * 3, font=font)
    return canvas


def save_png(picture: Image.Image, path: Path, **metadata: str) -> None:
    """Write a PNG; ``metadata`` goes into its text chunks."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        picture.save(unfinished, format="PNG", pnginfo=info)


def _clip(text: str, width: float, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """``text``, shortened with an ellipsis until it fits ``width`` pixels."""
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip("… ") + "…" if len(text) > 2 else ""
    return text
