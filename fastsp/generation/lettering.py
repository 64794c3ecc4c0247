"""Users' texts in pictures: any script that an installed font covers; nothing in them can break the layout."""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def one_line(text: str) -> str:
    """``text`` as one line of visible characters: no control characters, no direction overrides, single spaces."""
    whole = text.encode("utf-8", "replace").decode("utf-8")  # arguments that were not UTF-8 have lone surrogates
    visible = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in whole)
    kept = (c for c in visible if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn"))
    return " ".join("".join(kept).split())


def font_for(text: str, size: int) -> Font:
    """The font with most of the characters of ``text``: DejaVu Sans, or an installed font where that lacks some."""
    default = _default_font()
    if default is None:
        return ImageFont.load_default(size)
    characters = frozenset(ord(c) for c in text if not c.isspace())
    best = default
    if characters - _characters(default):
        best = min((default, *_system_fonts()), key=lambda font: len(characters - _characters(font)))
    return ImageFont.truetype(best, size)


def wrap(text: str, width: float, font: Font, max_lines: int) -> list[str]:
    """``text`` in at most ``max_lines`` lines of ``width`` pixels; an ellipsis ends what does not fit."""
    lines: list[str] = []
    rest = one_line(text)[: 8 * max(1, int(width)) * max_lines]  # no text is worth measuring megabytes
    while rest and len(lines) < max_lines:
        line = _fitting(rest, width, font)
        if len(line) < len(rest):
            if len(lines) == max_lines - 1:
                return [*lines, _fitting(rest, width - font.getlength("…"), font).rstrip() + "…"]
            space = line.rfind(" ")
            line = line[:space] if space > 0 and rest[len(line)] != " " else line
        lines.append(line.strip())
        rest = rest[len(line) :].lstrip()
    return lines


def _fitting(text: str, width: float, font: Font) -> str:
    """The longest beginning of ``text`` that fits, of one character at least."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return text[:low]


@cache
def _default_font() -> str | None:
    """matplotlib's copy of DejaVu Sans, which has Latin, Greek, Cyrillic, Arabic, Hebrew and many signs."""
    try:
        from matplotlib import get_data_path
    except ModuleNotFoundError:
        return None
    return str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


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
