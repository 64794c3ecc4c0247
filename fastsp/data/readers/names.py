"""File names: what is an image, what is a caption, and which belong together. The same for folders and tars."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jfif", "jpe")
UNREAD_SUFFIXES = ("avif", "heic", "heif", "jxl", "jp2", "svg", "psd", "tga", "exr", "dng", "cr2", "nef", "arw")
CAPTION_SUFFIXES = ("txt", "json", "caption")  # in order of preference; what is empty counts as missing


def split_name(name: str) -> tuple[str, str]:
    """A file's key and its suffix in lower case: `a/b.c.JPG` is `a/b.c` and `jpg`."""
    key, _, suffix = name.rpartition(".")
    return (key, suffix.lower()) if key and "/" not in suffix else (name, "")


def nfc(name: str) -> str:
    """With accents composed: macOS writes names decomposed (NFD), so that a picture and its caption, one of which came
    from elsewhere, may differ though they look the same."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def printable(name: str) -> str:
    """A name of the file system as text that every file and screen takes: bytes that are not UTF-8 become `\\udcXX`."""
    return name.encode(errors="backslashreplace").decode()


def and_more(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return f"{names[0]} (and {len(names) - 1} more)" if len(names) > 1 else names[0]
