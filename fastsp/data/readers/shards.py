"""Random access to tar shards in WebDataset layout, through an index that is made once: any sample is one seek away,
and the order of an epoch is free."""

from __future__ import annotations

import hashlib
import io
import os
import re
import resource
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from glob import escape, glob
from pathlib import Path

import torch
from torch import Tensor

from fastsp.data.config import DataConfig
from fastsp.data.images.files import upright_size
from fastsp.data.inventory import Inventory, Part
from fastsp.data.readers.captions import caption_of
from fastsp.data.readers.masks import key_of_mask, note_on_masks
from fastsp.data.readers.names import IMAGE_SUFFIXES, nfc, printable
from fastsp.data.readers.sizes import Size, measure_all, measured
from fastsp.data.readers.tar_index import load_or_build_index, with_column
from fastsp.data.samples import BadSample, EncodedSample, SampleReader, check_file_size
from fastsp.errors import UserError

Patterns = str | Path | Iterable[str | Path]
NO_MASK = -1
_ALLOWED = "allowed: tar files, folders of them, brace and glob patterns, such as FOLDER/**/*.tar for folders in it"


def find(config: DataConfig) -> Callable[[bool], SampleReader]:
    """The tars that a `data.path` names, see `fastsp.data.config.register`."""
    shards = expand_shards(config.given_path())
    captioned = not config.unconditional
    if config.masks:
        return lambda progress: MaskedShards(ShardReader(shards, captioned, progress))
    return lambda progress: ShardReader(shards, captioned, progress)


def expand_shards(patterns: Patterns) -> list[Path]:
    """The tar files that patterns stand for, in the order given and each pattern's sorted by name.

    A pattern is a tar file, a folder of them, or has braces (`{00000..00231}`, `{a,b}`) and wildcards (`*`, `?`,
    `[0-9]`, `**`). What is there under the very name is meant itself. UserError: it matches nothing.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    names = [[name] if os.path.exists(os.path.expanduser(name)) else expand_braces(name) for name in map(str, patterns)]
    shards = [shard for expanded in names for name in expanded for shard in _matches(name)]
    if not shards:
        raise UserError(f"data.path names no shards; {_ALLOWED}")
    once: dict[Path, Path] = {}
    for shard in shards:  # a file counts under the first of its names
        once.setdefault(shard.resolve(), shard)
    return list(once.values())


def expand_braces(pattern: str) -> list[str]:
    """Shell braces: `{00..11}` counts, keeping leading zeros; `{a,b}` lists. Several multiply, leftmost slowest."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if counted and int(counted[1]) <= int(counted[2]):
        choices = [str(number).zfill(len(counted[1])) for number in range(int(counted[1]), int(counted[2]) + 1)]
    else:
        choices = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in choices for name in expand_braces(before + choice + after)]


def _matches(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    folder, pattern = (path, "*") if path.is_dir() else (path.parent, path.name)
    place = escape(str(folder)) if folder.is_dir() else str(folder)  # by that very name, which may have brackets in it
    found = glob(f"{place}/{pattern}", recursive=True)
    shards = sorted(Path(match) for match in found if match.lower().endswith(".tar"))
    if not shards:
        raise UserError(f"data.path: no shard at {name!r}; {_ALLOWED}")
    return shards


def add_members(tar: tarfile.TarFile, key: str, **content_by_suffix: bytes) -> None:
    """Write a sample. Its members have owner 0, time 0 and mode 0644: no trace of the machine."""
    for suffix, content in content_by_suffix.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


class ShardReader:
    """The samples of tar shards, in their order, with captions or, unless `captioned`, with empty ones.

    UserError: there are no shards, or no sample.
    """

    suffixes: Sequence[str] = IMAGE_SUFFIXES  # of the members that make a sample, see `scan_tar`
    size_of: Callable[[bytes], Size | None] = staticmethod(upright_size)  # see `fastsp.data.readers.sizes.measured`

    def __init__(self, patterns: Patterns, captioned: bool = True, progress: bool = False):
        self.index = load_or_build_index(expand_shards(patterns), self.suffixes, progress)
        self.captioned = captioned
        self.damaged, self.notes, self.lost = self.index.damaged, self.index.notes, self.index.lost
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # that this process may have open; a quarter are tars
        self._open = lru_cache(4096 if files == resource.RLIM_INFINITY else min(4096, files // 4))(_OpenFile)
        if len(self.index) == 0:
            kinds, shards = ", ".join(self.suffixes), self.index.shards
            why = f": {self.damaged[0][1]}" if self.damaged else ""
            raise UserError(f"data.path: no samples ({kinds}) in {len(shards)} shards from {shards[0]}{why}")

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        """The tar's path and the sample's key, in which bytes that are not UTF-8 are escaped."""
        shard = self.index.shards[int(self.index.columns["locations"][index, 0])]
        key, _ = self._keys(index, index + 1)
        return printable(f"{shard}#{key.decode(errors='surrogateescape')}")

    def inventory(self) -> Inventory:
        """The samples of every tar."""
        shards = self.index.shards
        first, parts = 0, []
        sizes = torch.bincount(self.index.columns["locations"][:, 0], minlength=len(shards)).tolist()
        for shard, size in zip(shards, sizes, strict=True):
            keys, ends = self._keys(first, first + size)
            digest = hashlib.sha256(keys)
            digest.update(ends.numpy().tobytes())
            parts.append(Part(printable(Path(shard).name), size, digest.hexdigest()))
            first += size
        return Inventory(tuple(parts))

    def _keys(self, first: int, last: int) -> tuple[bytes, Tensor]:
        """Keys of consecutive samples, one after the other, and where each ends in that."""
        ends = self.index.columns["key_ends"][first:last]
        start = int(self.index.columns["key_ends"][first - 1]) if first else 0
        stop = int(ends[-1]) if last > first else start
        return self.index.columns["keys"][start:stop].numpy().tobytes(), ends - start

    def check(self, content: bytes) -> None:
        """Raises BadSample for content that says of itself that it is none; images do not."""

    def sizes(self, workers: int, progress: bool) -> Tensor:
        """(N, 2) int64, heights and widths of the upright images by their headers; 0 where they are not known. They are
        kept with the index."""

        def size(index: int) -> Size:
            shard, offset, length, *_ = self.index.columns["locations"][index].tolist()

            def first(count: int | None) -> bytes:
                try:
                    return self._open(self.index.shards[shard]).read(offset, min(count or length, length))
                except OSError as error:
                    raise BadSample(str(error)) from error

            return measured(first, self.size_of)

        return with_column(self.index, "sizes", self.suffixes, lambda: measure_all(size, len(self), workers, progress))

    def content(self, index: int) -> bytes:
        """A sample's image alone; raises BadSample."""
        shard, offset, size, *_ = self.index.columns["locations"][index].tolist()
        try:
            return self._open(self.index.shards[shard]).read(offset, size)
        except OSError as error:
            self._open.cache_clear()
            raise BadSample(f"cannot read the shard: {error.strerror or error}") from error

    def read(self, index: int) -> EncodedSample:
        """One sample; raises BadSample. The tar stays open for the next ones, since opening it is what takes time on a
        network's file system."""
        shard, *spans = self.index.columns["locations"][index].tolist()
        try:
            tar = self._open(self.index.shards[shard])
            image = tar.read(*spans[0:2])
            self.check(image)
            if not self.captioned:
                return EncodedSample(image, "")
            caption = caption_of((kind, tar.read(*span)) for kind, span in (("txt", spans[2:4]), ("json", spans[4:6])))
        except OSError as error:
            self._open.cache_clear()  # a stale handle may be replaced by a new one the next time
            raise BadSample(f"cannot read the shard: {error.strerror or error}") from error
        return EncodedSample(image, caption)


class MaskedShards:
    """A reader of tars in which some images are masks of others."""

    def __init__(self, shards: ShardReader):
        self.shards = shards
        self.captioned, self.damaged, self.lost = shards.captioned, shards.damaged, shards.lost
        self.pictures, self.masks = _split(shards)
        masked = int((self.masks != NO_MASK).sum())
        self.notes = [*shards.notes, (shards.index.shards[0], note_on_masks(len(self.pictures), masked))]

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        return self.shards.name(int(self.pictures[index]))

    def inventory(self) -> Inventory:
        return self.shards.inventory()

    def sizes(self, workers: int, progress: bool) -> Tensor:
        """See `ShardReader`."""
        return self.shards.sizes(workers, progress)[self.pictures]

    def read(self, index: int) -> EncodedSample:
        sample = self.shards.read(int(self.pictures[index]))
        mask = int(self.masks[index])
        return sample if mask == NO_MASK else EncodedSample(sample.content, sample.caption, self.shards.content(mask))


def _split(shards: ShardReader) -> tuple[Tensor, Tensor]:
    """The pictures' indices, (N,) int64, and those of their masks, or NO_MASK."""
    keys = [*_keys(shards)]
    owners = {
        index: owner for index, (shard, key) in enumerate(keys) if (owner := key_of_mask(f"{key}.png")) is not None
    }
    masks = {(keys[index][0], owner): index for index, owner in owners.items()}
    pictures = [index for index in range(len(keys)) if index not in owners]
    of_each = [masks.get((keys[index][0], nfc(keys[index][1])), NO_MASK) for index in pictures]
    return torch.tensor(pictures, dtype=torch.int64), torch.tensor(of_each, dtype=torch.int64)


def _keys(shards: ShardReader) -> Iterator[tuple[int, str]]:
    """The shard and the key of every image."""
    columns, start = shards.index.columns, 0
    names = columns["keys"].numpy().tobytes()
    for shard, end in zip(columns["locations"][:, 0].tolist(), columns["key_ends"].tolist(), strict=True):
        yield shard, names[start:end].decode(errors="surrogateescape")
        start = end


class _OpenFile:
    """A file open for reading at any place from many threads; closed when the last of them lets go of it."""

    def __init__(self, path: str):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        check_file_size(size)
        content = os.pread(self.descriptor, size, offset) if size else b""
        if len(content) != size:
            raise BadSample(f"the shard ends early: {len(content)} of {size} bytes")
        return content
