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

from fastsp.data.readers.names import CAPTION_SUFFIXES, IMAGE_SUFFIXES, UNREAD_SUFFIXES, and_more, nfc, split_name

CHUNK = 1 << 20  # bytes read at once where no member is
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

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
        self.unused: list[str] = []  # members of which another one has the name or the key
        self.texts: list[str] = []  # text files that caption no picture
        self.unread: list[str] = []  # pictures of kinds that are not read
        self._spans: dict[str, Span] = {}  # by member's name, in the order of the tar

    def notes(self) -> list[str]:
        """What is no loss, but may surprise."""
        notes = {
            "is of a kind that is not read": self.unread,
            "is not used: another member has the same name or key": self.unused,
            "is not used: a text file that captions no picture": self.texts,
        }
        return [f"{and_more(names)} {what}" for what, names in notes.items() if names]

    def read(self, file: BinaryIO) -> None:
        """Take all members of a tar, and the damage between them."""
        start, size = file.read(8), os.fstat(file.fileno()).st_size
        kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
        if kind is not None:
            self.damages.append(f"compressed ({kind}): samples are read in place, so unpack it to a plain tar")
            return
        if not start:
            self.damages.append("not a tar: the file is empty")
        end = 0  # of the latest member
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
            self.damages.append(f"damaged tar header at byte {start}" if start else "not a tar: no header at its start")

    def _take(self, member: tarfile.TarInfo) -> None:
        """A member; the last of a name counts, as when the tar is unpacked."""
        name = member.name.removeprefix("./")
        if member.isdir() or any(part.startswith(".") for part in name.split("/")):
            return
        suffix = split_name(name)[1]
        if suffix not in self.suffixes and suffix not in CAPTION_SUFFIXES:
            self.unread += [name] if suffix in UNREAD_SUFFIXES else []
            return
        self.unused += [name] if self._spans.pop(name, None) is not None else []
        if member.issparse():
            self.unusable.append((name, "a sparse member, which cannot be read in place; pack it without --sparse"))
        elif member.isfile():
            self._spans[name] = (member.offset_data, member.size)
        else:
            self.unusable.append((name, "a link, or not a file at all; pack it with --dereference --hard-dereference"))

    def group(self) -> None:
        """Make the samples of the members."""
        groups: dict[str, dict[str, str]] = {}  # by key in NFC: names by suffix
        for name in self._spans:
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
            image, text, as_json, kohya = (
                self._spans[group[suffix]] if suffix in group else (0, 0) for suffix in (images[0], *CAPTION_SUFFIXES)
            )
            if text[1] == 0 and "json" not in group:
                text = kohya
            elif "caption" in group:
                self.unused.append(group["caption"])
            self.samples.append((split_name(group[images[0]])[0], (image, text, as_json)))
        self._spans.clear()

    def _images(self, group: dict[str, str]) -> list[str]:
        return [suffix for suffix in self.suffixes if suffix in group]


def scan_tar(path: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> TarScan:
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
    file.seek(0)
    with suppress(tarfile.TarError, ValueError, OverflowError):
        tar = tarfile.TarFile(fileobj=file, ignore_zeros=True, encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None and member.size >= 0:
            tar.members.clear()  # type: ignore[attr-defined]  # the whole list would fill the memory
            yield member, tar.offset
