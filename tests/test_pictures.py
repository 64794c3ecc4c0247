"""Pictures: values, layout, metadata."""

from __future__ import annotations

import torch
from PIL import Image

from fastsp.pictures import grid, save_png, to_pil


def test_pixel_values():
    (grey,) = to_pil(torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(1, 1, 2, 2))
    assert grey.mode == "L" and list(grey.tobytes()) == [0, 128, 255, 255]
    (colour,) = to_pil(torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1))
    assert colour.mode == "RGB" and colour.getpixel((0, 0)) == (255, 0, 0)


def test_grid_places_every_picture():
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    picture = grid(images, columns=3, min_size=16)
    assert picture.size == (2 + 3 * 18, 2 + 2 * 18)
    centres = [picture.getpixel((2 + 18 * column + 8, 2 + 18 * row + 8))[0] for row in range(2) for column in range(3)]
    assert centres == [0, 51, 102, 153, 204, 255]
    titled = grid(images, columns=3, row_titles=["a", "b"], column_titles=["x" * 100, "y", "z"], min_size=16)
    assert titled.width > picture.width and titled.height > picture.height


def test_png_with_metadata(tmp_path):
    file = tmp_path / "new" / "picture.png"
    save_png(grid(torch.zeros(1, 3, 4, 4)), file, prompts="ein Größenwahn\nzwei", seed="7")
    assert [path.name for path in file.parent.iterdir()] == ["picture.png"]
    assert Image.open(file).text == {"prompts": "ein Größenwahn\nzwei", "seed": "7"}
