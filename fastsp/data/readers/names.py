"""File names: what is an image, what is a caption, and which belong together. The same for folders and tars."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jfif", "jpe", "avif")
UNREAD_SUFFIXES = ("heic", "heif", "jxl", "jp2", "svg", "psd", "tga", "exr", "dng", "cr2", "nef", "arw")
UNREAD, UNUSED = "is of a kind that is not read", "captions no picture"
CAPTION_SUFFIXES = ("txt", "json", "caption")  # in order of preference; what is empty counts as missing


def split_name(name: str) -> tuple[str, str]:
    """A file's key and its suffix in lower case: `a/b.c.JPG` is `a/b.c` and `jpg`."""
    key, _, suffix = name.rpartition(".")
    return (key, suffix.lower()) if key and "/" not in suffix else (name, "")


def texts_by_image(
    names: Iterable[str], suffixes: Sequence[str] = IMAGE_SUFFIXES
) -> tuple[dict[str, list[str]], list[str]]:
    """The files that may hold the caption of each image, most preferred first, and the text files that caption none.

    They are named as the image without its suffix, or with it. The images keep their order, the others are sorted.
    """
    parts = {name: split_name(nfc(name)) for name in names}
    texts = {part: name for name, part in sorted(parts.items())}
    beside = {
        name: [texts[key, kind] for kind in CAPTION_SUFFIXES for key in (part[0], nfc(name)) if (key, kind) in texts]
        for name, part in parts.items()
        if part[1] in suffixes
    }
    used = {text for found in beside.values() for text in found}
    unused = (name for name, (_, suffix) in parts.items() if suffix in ("txt", "caption") and name not in used)
    return beside, sorted(unused)


def notes_on(names_by_note: Mapping[str, Sequence[str]]) -> list[str]:
    """What is no loss, but may surprise, where there are names that it is true of."""
    return [f"{and_more(names)} {note}" for note, names in names_by_note.items() if names]


def nfc(name: str) -> str:
    """With accents composed: macOS writes names decomposed (NFD), so that a picture and its caption, one of which came
    from elsewhere, may differ though they look the same."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def printable(name: str) -> str:
    """A name of the file system as text that every file and screen takes: bytes that are not UTF-8 become `\\udcXX`."""
    return name.encode(errors="backslashreplace").decode()


def and_more(names: Sequence[str]) -> str:
    """The first of some names, printable, and how many more there are."""
    return printable(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
