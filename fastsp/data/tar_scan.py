"""Reading the headers of one tar shard: where its samples lie, and what in it cannot be used.

A sample is an image and the captions that share its key, the member's name up to its last dot, as beside each other in
a folder: `a/b.c.jpg` and `a/b.c.txt`. Hidden members are skipped, links are followed within the tar. Damage costs the
member that it hits: reading goes on at the next block that is a header by its checksum.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jfif", "jpe")
UNREAD_SUFFIXES = ("avif", "heic", "heif", "jxl", "jp2", "svg", "psd", "tga", "exr", "dng", "cr2", "nef", "arw")
CAPTION_SUFFIXES = ("txt", "json", "caption")  # in order of preference; what is empty counts as missing
BLOCK = 512  # a tar is a sequence of blocks of this many bytes
_READ_BLOCKS, _MAX_READ_BLOCKS = 128, 8192  # at once, when looking for the next header: mostly it is near
_CHECKSUM_DIGITS = slice(148, 154)  # of a header: six octal digits, blanks before them in old archives
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NAMED = 3  # damaged places of one tar that are named, of perhaps thousands

Span = tuple[int, int]
"""Offset and size in the tar, in bytes."""
MISSING: Span = (0, 0)


class Sample(NamedTuple):
    """Where one sample lies. A caption that is missing or empty has size 0."""

    image: Span
    text: Span
    json: Span


class TarScan(NamedTuple):
    """What one tar holds."""

    samples: list[tuple[str, Sample]]
    """By key, in the order of the tar."""
    damage: str | None
    """What is broken in the tar itself."""
    unusable: list[tuple[str, str]]
    """Members of samples that cannot be read in place, with the reason."""
    lost: int
    """Samples that the damage cost, at least: estimated by the bytes that no header leads to. What a tar that was cut
    has lost with its end cannot be known."""
    notes: list[str]
    """What is no loss, but may surprise."""
    has_end: bool
    """Whether it ends with the blocks of zeros that most writers put there. Without, it may have been cut just between
    two members."""


def scan_tar(path: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> TarScan:
    """Read one tar's headers, seeking over the contents.

    Args:
        path: of the tar.
        suffixes: of the members that make a sample, in order of preference where several share a key.
    """
    scan = _Scan((*suffixes, *CAPTION_SUFFIXES))
    try:
        with path.open("rb") as file:
            scan.size = path.stat().st_size
            _read(file, scan.size, scan)
    except OSError as error:
        scan.damages.append((f"cannot be read: {error.strerror or error}", 0))
    return scan.result(suffixes)


def split_name(name: str) -> tuple[str, str]:
    """A file's key and its suffix in lower case: `a/b.c.JPG` is `a/b.c` and `jpg`."""
    key, _, suffix = name.rpartition(".")
    return (key, suffix.lower()) if key and "/" not in suffix else (name, "")


class _Scan:
    """What was met in a tar so far."""

    def __init__(self, suffixes: Sequence[str]):
        self.suffixes = suffixes
        self.size = 0
        """Of the tar, in bytes."""
        self.spans: dict[str, Span | None] = {}
        """By member's name, in the order of the tar; None: a link, or not to be read."""
        self.links: dict[str, str] = {}
        self.unusable: list[tuple[str, str]] = []
        self.again: Counter[str] = Counter()
        self.unread: list[str] = []
        """Pictures of kinds that are not read."""
        self.damages: list[tuple[str, int]] = []
        """Reason, and the bytes that no header leads to."""
        self.notes: list[str] = []
        self.has_end = True

    def take(self, member: tarfile.TarInfo) -> None:
        """A member; the last of a name counts, as when the tar is unpacked."""
        name = member.name.removeprefix("./")
        if member.isdir() or any(part.startswith(".") for part in name.split("/")):
            return
        suffix = split_name(name)[1]
        if suffix not in self.suffixes:
            self.unread += [name] if suffix in UNREAD_SUFFIXES else []
            return
        self.again[name] += name in self.spans
        self.links.pop(name, None)
        self.spans[name] = None
        if member.issparse():
            self.unusable.append((name, "a sparse member, which cannot be read in place; pack it without --sparse"))
        elif member.isfile():
            self.spans[name] = (member.offset_data, member.size)
        elif member.islnk():
            self.links[name] = member.linkname.removeprefix("./")
        elif member.issym():
            self.links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        else:
            self.unusable.append((name, "not a file"))

    def result(self, suffixes: Sequence[str]) -> TarScan:
        self._follow_links()
        samples = list(self._samples(suffixes))
        self._note(self.unread, "is of a kind that is not read")
        self._note(sorted(+self.again), "is there more than once; the last one counts, as when the tar is unpacked")
        return TarScan(samples, self._damage(), self.unusable, self._lost(len(samples)), self.notes, self.has_end)

    def _follow_links(self) -> None:
        for name, target in self.links.items():
            self.spans[name] = self.spans.get(target)
            if self.spans[name] is None:
                self.unusable.append((name, f"a link to {target}, which is not a picture or caption in this tar"))

    def _samples(self, suffixes: Sequence[str]) -> Iterator[tuple[str, Sample]]:
        groups: dict[str, dict[str, Span]] = {}
        beside: list[str] = []
        for name, span in self.spans.items():
            if span is not None:
                key, suffix = split_name(name)
                group = groups.setdefault(key, {})
                beside += [name] if suffix in group else []
                group.setdefault(suffix, span)
        for key, group in groups.items():
            images = [suffix for suffix in suffixes if suffix in group]
            beside += [f"{key}.{suffix}" for suffix in images[1:]]
            if images:
                text, as_json = group.get("txt", MISSING), group.get("json", MISSING)
                if text[1] == 0 and "json" not in group:
                    text = group.get("caption", MISSING)
                elif "caption" in group:
                    beside.append(f"{key}.caption")
                yield key, Sample(group[images[0]], text, as_json)
        self._note(beside, "is not used: another image or caption has the same key")

    def _note(self, names: Sequence[str], what: str) -> None:
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            self.notes.append(f"{names[0]}{more} {what}")

    def _damage(self) -> str | None:
        more = len(self.damages) - _NAMED
        reasons = [reason for reason, _ in self.damages[:_NAMED]] + [f"{more} more damaged places"] * (more > 0)
        return "; ".join(reasons) or None

    def _lost(self, samples: int) -> int:
        """By the bytes, headers and all, that a sample takes where nothing is damaged."""
        damaged = sum(size for _, size in self.damages)
        each = (self.size - damaged) / samples if samples else float("inf")
        return sum(max(1, int(size / each)) for _, size in self.damages)


def _read(file: BinaryIO, size: int, scan: _Scan) -> None:
    """All members of a tar, and the damage between them."""
    start = file.read(8)
    kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
    if kind is not None:
        scan.damages.append((f"compressed ({kind}): samples are read in place, so unpack it to a plain tar", size))
        return
    if size == 0:
        scan.damages.append(("not a tar: the file is empty", 0))
    place: int | None = 0
    while place is not None and place < size:
        end, cut = _take_members(file, place, size, scan)
        place = _go_on(file, end, cut, size, scan)


def _take_members(file: BinaryIO, place: int, size: int, scan: _Scan) -> tuple[int, str | None]:
    """The members from a header on. Returns where they end, and the name of a last one that is cut, if any."""
    file.seek(place)
    end = place
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None and member.size >= 0:
            if not member.issparse() and member.isfile() and member.offset_data + member.size > size:
                return member.offset_data, member.name
            end = tar.offset
            scan.take(member)
            tar.members = []  # type: ignore[attr-defined] # for lookups by name, which nobody makes
    except (tarfile.TarError, ValueError, OverflowError):  # the last two: of extended headers
        pass
    return end, None


def _go_on(file: BinaryIO, end: int, cut: str | None, size: int, scan: _Scan) -> int | None:
    """After the members: says what is damaged there. Returns where the next header is, if any."""
    header, only_zeros = _next_header(file, end, size)
    stop = size if header is None else header
    if cut is not None:
        what = f"ends early, in {cut}" if header is None else f"damaged: another header lies in {cut}, at byte {stop}"
        scan.damages.append((what, stop - end))
    elif not only_zeros:
        what = f"damaged tar header at byte {end}" if end else "not a tar: no header at its start"
        scan.damages.append((what, stop - end))
    elif header is None and end >= size:
        scan.has_end = False
    return header


def _next_header(file: BinaryIO, start: int, size: int) -> tuple[int | None, bool]:
    """The first block after the one at `start` that is a header by its checksum, and whether only zeros lie before."""
    only_zeros, offset, count = True, start, _READ_BLOCKS
    while offset < size:
        file.seek(offset)
        content = file.read(BLOCK * count)
        blocks = np.frombuffer(content[: len(content) // BLOCK * BLOCK], np.uint8).reshape(-1, BLOCK)
        digits = blocks[:, _CHECKSUM_DIGITS]
        likely = ((digits >= ord("0")) & (digits <= ord("7")) | (digits == ord(" "))).all(1)
        for index in likely.nonzero()[0].tolist():
            place = offset + index * BLOCK
            if place > start and _is_header(blocks[index].tobytes()):
                return place, only_zeros and not blocks[:index].any()
        only_zeros = only_zeros and not content.strip(b"\0")
        offset, count = offset + BLOCK * count, min(2 * count, _MAX_READ_BLOCKS)
    return None, only_zeros


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True
