"""Reading the headers of one tar shard: where its samples lie, and what in it cannot be used.

A sample is an image and the captions that share its key, the member's name up to its last dot, as beside each other in
a folder: `a/b.c.jpg` and `a/b.c.txt`. Hidden members are skipped. Damage costs the member that it hits: `tarfile` goes
on at the next block that is a header by its checksum.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from fastsp.data.readers import names

CHUNK = 1 << 20  # bytes read at once where no member is
_NO_TAR = "not a tar: no header at its start (a compressed one must be unpacked: samples are read in place)"

Span = tuple[int, int]
"""Offset and size in the tar, in bytes. What is missing or empty has size 0."""


class TarScan:
    """What one tar holds. Made by `scan_tar`."""

    def __init__(self, suffixes: Sequence[str]):
        self.suffixes = suffixes
        self.samples: list[tuple[str, tuple[Span, Span, Span]]] = []
        """By key, in the order of the tar: image, text and JSON."""
        self.damages: list[str] = []  # what is broken in the tar itself. Each of these has cost a sample, at least.
        self.unusable: list[tuple[str, str]] = []  # members of samples that cannot be read in place, with the reason
        self.notes: list[str] = []  # what is no loss, but may surprise
        self._hidden: list[str] = []  # members of which another one has the name or the key
        self._unread: list[str] = []  # pictures of kinds that are not read
        self._spans: dict[str, Span] = {}  # by member's name, in the order of the tar

    def read(self, file: BinaryIO) -> None:
        """Take all members of a tar, and the damage between them."""
        end, size = 0, os.fstat(file.fileno()).st_size
        if not size:
            self.damages.append(_NO_TAR)
        for member, after in _members(file):
            self._look_between(file, end, member.offset)
            if member.isfile() and not member.issparse() and member.offset_data + member.size > size:
                self.damages.append(f"ends early, in {member.name}")
                return
            self._take(member)
            end = after
        self._look_between(file, end, size)

    def _look_between(self, file: BinaryIO, start: int, stop: int) -> None:
        """Where no member is there are zeros, or damage."""
        file.seek(start)
        if any(file.read(min(CHUNK, stop - at)).strip(b"\0") for at in range(start, stop, CHUNK)):
            self.damages.append(f"damaged tar header at byte {start}" if start else _NO_TAR)

    def _take(self, member: tarfile.TarInfo) -> None:
        """A member; the last of a name counts, as when the tar is unpacked."""
        name = member.name.removeprefix("./")
        if member.isdir() or any(part.startswith(".") for part in name.split("/")):
            return
        suffix = names.split_name(name)[1]
        if suffix not in self.suffixes and suffix not in names.CAPTION_SUFFIXES:
            self._unread += [name] if suffix in names.UNREAD_SUFFIXES else []
            return
        self._hidden += [name] if self._spans.pop(name, None) is not None else []
        if member.issparse():
            self.unusable.append((name, "a sparse member, which cannot be read in place; pack it without --sparse"))
        elif member.isfile():
            self._spans[name] = (member.offset_data, member.size)
        else:
            self.unusable.append((name, "a link, or not a file at all; pack it with --dereference --hard-dereference"))

    def group(self) -> None:
        """Make the samples of the members. They stand in the order of the first member of each key."""
        texts, unused = names.texts_by_image(self._spans, self.suffixes)
        images: dict[str, list[str]] = {}
        for name in self._spans:
            images.setdefault(names.split_name(names.nfc(name))[0], []).extend([name] if name in texts else [])
        for candidates in filter(None, images.values()):
            image, *others = sorted(candidates, key=lambda name: self.suffixes.index(names.split_name(name)[1]))
            self._hidden += others
            found: dict[str, Span] = {}
            for text in texts[image]:
                if self._spans[text][1]:
                    found.setdefault(names.split_name(text)[1], self._spans[text])
            kohya = (0, 0) if "json" in found else found.get("caption", (0, 0))
            captions = found.get("txt", kohya), found.get("json", (0, 0))
            self.samples.append((names.split_name(image)[0], (self._spans[image], *captions)))
        self._spans.clear()
        hidden = "is not used: another member has the same name or key"
        self.notes = names.notes_on({names.UNREAD: self._unread, hidden: self._hidden, names.UNUSED: unused})


def scan_tar(path: Path, suffixes: Sequence[str] = names.IMAGE_SUFFIXES) -> TarScan:
    """Read one tar's headers, seeking over the contents. The suffixes are those of the members that make a sample, in
    order of preference where several share a key."""
    scan = TarScan(suffixes)
    try:
        with path.open("rb") as file:
            scan.read(file)
    except OSError as error:
        scan.damages.append(f"cannot be read: {error.strerror or error}")
    scan.group()
    return scan


def _members(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The members, and where each ends. What follows a damaged extended header is lost."""
    with suppress(tarfile.TarError, ValueError, OverflowError):
        tar = tarfile.TarFile(fileobj=file, ignore_zeros=True, encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None and member.size >= 0:
            tar.members.clear()  # type: ignore[attr-defined]  # the whole list would fill the memory
            yield member, tar.offset
