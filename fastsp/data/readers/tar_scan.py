"""Reading the headers of one tar shard: where its samples lie, and what in it cannot be used.

A sample is an image and the captions that share its key, the member's name up to its last dot, as beside each other in
a folder: `a/b.c.jpg` and `a/b.c.txt`. Hidden members are skipped. Damage costs the member that it hits: reading goes on
at the next block that is a header by its checksum, as `tarfile` does with `ignore_zeros`.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastsp.data.readers.names import CAPTION_SUFFIXES, IMAGE_SUFFIXES, UNREAD_SUFFIXES, and_more, nfc, split_name

BLOCK = 512  # a tar is a sequence of blocks of this many bytes
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
    """Samples that the damage cost, at least: estimated by the bytes that no header leads to. What lay behind the place
    where a tar was cut cannot be known."""
    notes: list[str]
    """What is no loss, but may surprise."""


def scan_tar(path: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> TarScan:
    """Read one tar's headers, seeking over the contents.

    Args:
        path: of the tar.
        suffixes: of the members that make a sample, in order of preference where several share a key.
    """
    scan = _Scan(suffixes)
    try:
        with path.open("rb") as file:
            scan.size = os.fstat(file.fileno()).st_size
            _read(file, scan)
    except OSError as error:
        scan.damages.append((f"cannot be read: {error.strerror or error}", 0))
    return scan.result()


def _read(file: BinaryIO, scan: _Scan) -> None:
    """All members of a tar, and the damage between them."""
    start = file.read(8)
    kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
    if kind is not None:
        what = f"compressed ({kind}): samples are read in place, so unpack it to a plain tar"
        scan.damages.append((what, scan.size))
        return
    if not start:
        scan.damages.append(("not a tar: the file is empty", 0))
    tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * BLOCK)), encoding="utf-8", errors="surrogateescape")
    tar.fileobj = file  # only now: a damaged first header would end the constructor
    at = end = 0  # the next block; where the latest member ended
    cut: str | None = None  # the latest member, if its content would reach beyond the end of the file
    damaged = False  # since the latest member there was a block that is neither a header nor zeros
    while at < scan.size:
        member = _member(tar, file, at)
        if member is None:
            file.seek(at)
            damaged = damaged or bool(file.read(BLOCK).strip(b"\0"))
            at += BLOCK
            continue
        if damaged or cut is not None:
            scan.damages.append((_damage_at(end, cut, member.offset), member.offset - end))
        damaged, cut = False, None
        if member.isfile() and not member.issparse() and member.offset_data + member.size > scan.size:
            at, cut = member.offset_data, member.name
        else:
            scan.take(member)
            at = tar.offset
        end = at
    if damaged or cut is not None:
        scan.damages.append((_damage_at(end, cut, None), scan.size - end))


def _member(tar: tarfile.TarFile, file: BinaryIO, at: int) -> tarfile.TarInfo | None:
    """The member whose headers begin at an offset; None if there is no valid header."""
    tar.offset = at
    file.seek(at)
    try:
        member = tarfile.TarInfo.fromtarfile(tar)
    except (tarfile.TarError, ValueError, OverflowError):  # the last two: of extended headers
        return None
    return member if member.size >= 0 else None


def _damage_at(end: int, cut: str | None, header: int | None) -> str:
    if cut is not None:
        return f"ends early, in {cut}" if header is None else f"damaged: another header lies in {cut}, at byte {header}"
    return f"damaged tar header at byte {end}" if end else "not a tar: no header at its start"


class _Scan:
    """What was met in a tar so far."""

    def __init__(self, suffixes: Sequence[str]):
        self.suffixes = suffixes
        self.size = 0
        """Of the tar, in bytes."""
        self.spans: dict[str, Span] = {}
        """By member's name, in the order of the tar."""
        self.unusable: list[tuple[str, str]] = []
        self.unused: list[str] = []
        """Members of which another one has the name or the key."""
        self.texts: list[str] = []
        """Text files that caption no picture."""
        self.unread: list[str] = []
        """Pictures of kinds that are not read."""
        self.damages: list[tuple[str, int]] = []
        """Reason, and the bytes that no header leads to."""

    def take(self, member: tarfile.TarInfo) -> None:
        """A member; the last of a name counts, as when the tar is unpacked."""
        name = member.name.removeprefix("./")
        if member.isdir() or any(part.startswith(".") for part in name.split("/")):
            return
        suffix = split_name(name)[1]
        if suffix not in self.suffixes and suffix not in CAPTION_SUFFIXES:
            self.unread += [name] if suffix in UNREAD_SUFFIXES else []
            return
        self.unused += [name] if self.spans.pop(name, None) is not None else []
        if member.issparse():
            self.unusable.append((name, "a sparse member, which cannot be read in place; pack it without --sparse"))
        elif member.isfile():
            self.spans[name] = (member.offset_data, member.size)
        else:
            self.unusable.append((name, "a link, or not a file at all; pack it with --dereference --hard-dereference"))

    def result(self) -> TarScan:
        samples = list(self._samples())
        notes = {
            "is of a kind that is not read": self.unread,
            "is not used: another member has the same name or key": self.unused,
            "is not used: a text file that captions no picture": self.texts,
        }
        told = [f"{and_more(names)} {what}" for what, names in notes.items() if names]
        return TarScan(samples, self._damage(), self.unusable, self._lost(len(samples)), told)

    def _samples(self) -> Iterator[tuple[str, Sample]]:
        groups: dict[str, dict[str, str]] = {}  # by key in NFC: names by suffix
        for name in self.spans:
            key, suffix = split_name(nfc(name))
            group = groups.setdefault(key, {})
            if group.setdefault(suffix, name) != name:
                self.unused.append(name)
        for key, group in groups.items():
            base, suffix = split_name(key)
            if suffix in self.suffixes and base in groups and not self._images(group):  # x.jpg.txt beside x.jpg
                self.texts += [name for kind, name in group.items() if kind in groups[base]]
                groups[base] = group | groups[base]
                group.clear()
        for group in groups.values():
            images = self._images(group)
            if not images:
                self.texts += [name for suffix, name in group.items() if suffix != "json"]
                continue
            self.unused += [group[suffix] for suffix in images[1:]]
            text, as_json = self._span(group, "txt"), self._span(group, "json")
            if text[1] == 0 and "json" not in group:
                text = self._span(group, "caption")
            elif "caption" in group:
                self.unused.append(group["caption"])
            yield split_name(group[images[0]])[0], Sample(self.spans[group[images[0]]], text, as_json)

    def _images(self, group: dict[str, str]) -> list[str]:
        return [suffix for suffix in self.suffixes if suffix in group]

    def _span(self, group: dict[str, str], suffix: str) -> Span:
        return self.spans[group[suffix]] if suffix in group else MISSING

    def _damage(self) -> str | None:
        more = len(self.damages) - _NAMED
        reasons = [reason for reason, _ in self.damages[:_NAMED]] + [f"{more} more damaged places"] * (more > 0)
        return "; ".join(reasons) or None

    def _lost(self, samples: int) -> int:
        """By the bytes, headers and all, that a sample takes where nothing is damaged."""
        damaged = sum(size for _, size in self.damages)
        each = (self.size - damaged) / samples if samples else float("inf")
        return sum(max(1, int(size / each)) for _, size in self.damages)
