"""The index of tar shards: where every sample's image and caption lie.

It is one safetensors file of columns, memory-mapped when it is used, so that a hundred million samples cost no memory.
It lies beside the first shard, else in the cache folder, and is made again when a shard's size or time has changed.

A sample is an image and the captions that share its key, the member's name up to its last dot, as beside each other in
a folder: `a/b.c.jpg` and `a/b.c.txt`. Hidden members are skipped. Damage costs the member that it hits: `tarfile` goes
on at the next block that is a header by its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsp.data.readers import names
from fastsp.data.readers.names import IMAGE_SUFFIXES
from fastsp.utils.cache import cache_folder
from fastsp.utils.files import new_file
from fastsp.utils.progress import late_bar

VERSION = 5
CHUNK = 1 << 20  # bytes read at once where no member is
_NO_TAR = "not a tar: no header at its start (a compressed one must be unpacked: samples are read in place)"

Span = tuple[int, int]
"""Offset and size in the tar, in bytes. What is missing or empty has size 0."""


@dataclass(frozen=True)
class TarIndex:
    """The columns of the index, one row per sample, and the tars that they speak of."""

    shards: list[str]
    columns: dict[str, Tensor]
    """`locations` (N, 7) int64: shard, then offset and size of image, text and JSON; `keys` uint8: the keys' bytes one
    after the other; `key_ends` (N,) int64; perhaps `sizes` (N, 2) int64, see :func:`with_column`."""
    damaged: list[tuple[str, str]]
    """Tars that are broken, and members that cannot be read (`TAR#MEMBER`), with the reason."""
    notes: list[tuple[str, str]]  # tars in which something may surprise, though nothing is lost
    lost: int  # samples that the damage cost, at least

    def __len__(self) -> int:
        return len(self.columns["locations"])


def load_or_build_index(
    shards: Sequence[Path], suffixes: Sequence[str] = IMAGE_SUFFIXES, progress: bool = False
) -> TarIndex:
    """The index of these tars, from its file if that is up to date, else made and kept. Suffixes: see `scan_tar`."""
    # Links are not followed: their names say more than those that a hub's cache gives what they lead to.
    paths = [Path(os.path.abspath(shard)) for shard in shards]
    signature, places = _signature_of_all(paths, suffixes), _places(paths)
    for place in places:
        if (index := _load(place, paths, signature)) is not None:
            return index
    index = build_index(paths, suffixes, progress)
    any(_save(index, signature, place) for place in places)  # in the first that can be written
    return index


def with_column(index: TarIndex, name: str, suffixes: Sequence[str], make: Callable[[], Tensor]) -> Tensor:
    """A further column of the index, one row per sample; made if it is not there, and kept in the index's file."""
    if name not in index.columns:
        paths = [Path(shard) for shard in index.shards]
        signature = _signature_of_all(paths, suffixes)
        index.columns[name] = make()
        any(_save(index, signature, place) for place in _places(paths))
    return index.columns[name]


def _signature_of_all(paths: Sequence[Path], suffixes: Sequence[str]) -> str:
    """Asked for before the tars are read: one that is still being written is indexed anew the next time."""
    return json.dumps([VERSION, list(suffixes), [_signature(path) for path in paths]])


def _places(paths: Sequence[Path]) -> tuple[Path, Path]:
    """Where the index of these tars may lie."""
    name = f"index-{hashlib.sha256(json.dumps([str(path) for path in paths]).encode()).hexdigest()[:16]}.safetensors"
    return paths[0].parent / f".fastsp-{name}", cache_folder() / name


def build_index(shards: Sequence[Path], suffixes: Sequence[str] = IMAGE_SUFFIXES, progress: bool = False) -> TarIndex:
    """Read the headers of the tars, several at a time. A tar that is damaged gives what can be read of it."""
    parts: list[dict[str, Tensor]] = []
    damaged: list[tuple[str, str]] = []
    notes: list[tuple[str, str]] = []
    lost, workers = 0, min(16, len(shards))
    with late_bar("indexing tars", len(shards), progress) as advance, ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda number: _indexed(number, shards[number], suffixes), range(len(shards)))
        for shard, (columns, scan) in zip(map(str, shards), found, strict=True):
            parts.append(columns)
            damaged += [(names.printable(shard), names.and_more(scan.damages))] if scan.damages else []
            damaged += [(names.printable(f"{shard}#{member}"), reason) for member, reason in scan.unusable]
            notes += [(names.printable(shard), "; ".join(scan.notes))] if scan.notes else []
            lost += len(scan.damages)
            advance(1)
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    columns["key_ends"] = columns.pop("key_sizes").cumsum(0)
    return TarIndex([str(shard) for shard in shards], columns, damaged, notes, lost)


def _indexed(number: int, shard: Path, suffixes: Sequence[str]) -> tuple[dict[str, Tensor], TarScan]:
    """One tar's rows, and what else was found, without the samples: as Python objects, those of a large data set would
    fill the memory."""
    scan = scan_tar(shard, suffixes)
    keys = [key.encode(errors="surrogateescape") for key, _ in scan.samples]
    rows = [(number, *image, *text, *as_json) for _, (image, text, as_json) in scan.samples]
    scan.samples.clear()
    return {
        "locations": torch.tensor(rows, dtype=torch.int64).view(-1, 7),
        "keys": torch.tensor(list(b"".join(keys)), dtype=torch.uint8),
        "key_sizes": torch.tensor([len(key) for key in keys], dtype=torch.int64),
    }, scan


def _signature(path: Path) -> list | None:
    """What changes when a tar does; None where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [str(path), status.st_size, status.st_mtime_ns]


def _load(place: Path, shards: Sequence[Path], signature: str) -> TarIndex | None:
    """The index in a file; None where there is none, or one of other tars."""
    with suppress(OSError, SafetensorError, ValueError, TypeError, LookupError), safe_open(place, "pt") as file:
        metadata = file.metadata()
        if metadata["signature"] == signature:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            damaged, notes, lost = json.loads(metadata["found"])
            return TarIndex([str(path) for path in shards], columns, [*map(tuple, damaged)], [*map(tuple, notes)], lost)
    return None


def _save(index: TarIndex, signature: str, place: Path) -> bool:
    """Write the index; false where that cannot be."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        found = json.dumps([index.damaged, index.notes, index.lost])
        with new_file(place) as unfinished:
            save_file(index.columns, unfinished, metadata={"signature": signature, "found": found})
    except (OSError, SafetensorError):
        return False
    return True


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
    with suppress(tarfile.TarError, ValueError, OverflowError):
        tar = tarfile.TarFile(fileobj=file, ignore_zeros=True, encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None and member.size >= 0:
            tar.members.clear()  # type: ignore[attr-defined]  # the whole list would fill the memory
            yield member, tar.offset
