"""Pictures: values, layout, metadata."""

from __future__ import annotations

import torch
from PIL import Image

from fastsp.generation.grids import cell_side, font_for, grid, one_line, save_png, to_pil, wrap


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


def test_a_grid_has_a_bound(monkeypatch):
    pictures = [Image.new("RGB", (100, 50), (200, 0, 0))] * 4
    monkeypatch.setattr("fastsp.generation.grids.MAX_PIXELS", 4 * 40 * 40)
    picture = grid(pictures, columns=2)
    assert picture.size == (2 + 2 * 42, 2 + 2 * 22) and picture.getpixel((20, 10)) == (200, 0, 0)
    small = grid([Image.new("L", (7, 7))] * 4, columns=2, min_size=128)
    assert small.size == (2 + 2 * 37, 2 + 2 * 37), "enlarged five times, as far as there is room"
    assert cell_side(1024, 16) == 1024 and cell_side(1024, 100, 2**20) == 102 and cell_side(8, 2**40) == 1


def ink(picture: Image.Image, box: tuple[int, int, int, int]) -> int:
    """Dark pixels in a part of a picture."""
    return sum(value < 128 for value in picture.crop(box).convert("L").tobytes())


def test_captions_stay_below_their_picture():
    captions = ["short", "a much longer caption that needs two lines at least", ""]
    picture = grid(torch.ones(3, 3, 128, 128), columns=3, captions=captions)
    cells = [(2 + 130 * column, 130, 2 + 130 * column + 128, picture.height) for column in range(3)]
    short, long, none = (ink(picture, cell) for cell in cells)
    assert long > 2 * short > 0 == none
    assert ink(picture, (0, 0, picture.width, 130)) == 0


HOSTILE = [
    "\x1b[31mred\x1b[0m\n\n\tnext\0line",
    "\u202eoverride\u202c \u200bzero",
    "x" * 200_000,
    "\udcff\ud800 surrogates",
    "日本語の説明 " * 9,
    "وصف الصورة بالعربية",
    "תיאור התמונה 🐈‍⬛",
    "",
    " \n ",
]


def test_texts_of_any_script_and_hostile_ones(tmp_path):
    """Nothing of them crashes or leaves its place, and the metadata keep what can be kept."""
    calm = grid(torch.ones(9, 1, 64, 64), captions=["calm"] * 9, row_titles=["a"] * 3, column_titles=["b"] * 3)
    picture = grid(torch.ones(9, 1, 64, 64), captions=HOSTILE, row_titles=HOSTILE[:3], column_titles=HOSTILE[3:6])
    assert picture.width < calm.width + 270 and picture.height < calm.height + 5 * 3 * 20
    save_png(picture, tmp_path / "grid.png", prompts="\n".join(HOSTILE))
    text = Image.open(tmp_path / "grid.png").text["prompts"]
    assert "日本語の説明" in text and "\0" not in text and "?? surrogates" in text


def test_lines_are_wrapped_at_words_and_clipped():
    font = font_for("a", 13)
    lines = wrap("one two three four five six seven eight nine ten", 60, font, 3)
    assert len(lines) == 3 and lines[0] == "one two" and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 60 for line in lines)
    assert wrap("short", 60, font, 3) == ["short"] and wrap("", 60, font, 3) == []
    assert "".join(wrap("x" * 30, 60, font, 9)) == "x" * 30  # a word longer than a line is cut
    assert one_line(HOSTILE[0]) == "[31mred [0m next line" and one_line(HOSTILE[1]) == "override zero"


def test_the_font_that_has_the_characters():
    assert "DejaVu" in font_for("größe, Ελληνικά, русский", 13).path
    font_for("日本語", 13).getlength("日本語")  # whatever this machine has
