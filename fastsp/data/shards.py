"""Random access to tar shards in WebDataset layout, through an index that is made once.

A sample is the members of one tar that share a key, the name up to its last dot: an image, and a caption as `.txt`, or
as `.json` with the caption under "caption" or "text" as img2dataset writes it. The index holds where they lie, so that
any sample is one seek away and the order of an epoch is free.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from glob import escape, glob
from pathlib import Path

from torch import Tensor

from fastsp.data.captions import caption_of
from fastsp.data.inventory import Inventory
from fastsp.data.samples import BadSample, EncodedSample, LostFile, check_file_size, printable
from fastsp.data.tar_index import TarIndex, absolute, load_index, load_or_build_index
from fastsp.data.tar_scan import IMAGE_SUFFIXES, Span
from fastsp.errors import UserError

Patterns = str | Path | Iterable[str | Path]


def expand_shards(patterns: Patterns, gone: Collection[Path] = ()) -> list[Path]:
    """The tar files that patterns stand for, in the order given and each pattern's sorted by name.

    Args:
        patterns: one or several of: a tar file, a folder of them, or a pattern with braces (`{00000..00231}`, `{a,b}`)
            and wildcards (`*`, `?`, `[0-9]`, `**`). What is there under the very name is meant itself.
        gone: files that may be named though they are not there any more.

    Raises:
        UserError: a name in braces is missing, or a pattern matches nothing.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    names = [[name] if os.path.exists(os.path.expanduser(name)) else expand_braces(name) for name in map(str, patterns)]
    shards = [shard for expanded in names for name in expanded for shard in _matches(name, gone)]
    if not shards:
        raise UserError("data.path names no shards; allowed: tar files, folders of them, brace and glob patterns")
    once: dict[Path, Path] = {}
    for shard in shards:  # a file counts under the first of its names
        once.setdefault(shard.resolve(), shard)
    return list(once.values())


def expand_braces(pattern: str) -> list[str]:
    """Shell braces: `{00..11}` counts, keeping leading zeros, down too, and by a third number; `{a,b}` lists. Several
    multiply, leftmost slowest."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    counted = re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.-?0*([1-9]\d*))?", found[1])
    if counted:
        first, last, step = counted.groups(default="1")
        down = int(first) > int(last)
        numbers = range(int(first), int(last) + (-1 if down else 1), int(step) * (-1 if down else 1))
        choices = [str(number).zfill(len(first)) for number in numbers]
    else:
        choices = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in choices for name in expand_braces(before + choice + after)]


def _matches(name: str, gone: Collection[Path]) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file() or absolute(path) in gone:
        return [path]
    folder = path if path.is_dir() else path.parent
    pattern = "*" if path.is_dir() else path.name
    if folder.is_dir():  # by that very name, which may have brackets in it
        found = glob(f"{escape(str(folder))}/{pattern}", recursive=True)
    else:
        found = glob(str(path), recursive=True)
    shards = sorted(Path(match) for match in found if match.lower().endswith(".tar"))
    if not shards:
        deeper = path.is_dir() and next(path.glob("*/*.tar"), None)
        hint = f"; there are in the folders in it: {name}/**/*.tar" if deeper else ""
        raise UserError(
            f"data.path: no shard at {name!r}; allowed: tar files, their folders, brace and glob patterns{hint}"
        )
    return shards


class ShardReader:
    """The samples of tar shards, by index: shard after shard, in the order in which they lie there.

    Args:
        patterns: see `expand_shards`.
        captioned: whether a sample needs a caption; if not, captions are not read and are empty.
        suffixes: of the members that make a sample; images, if nothing else is said.
        known: all the shards when the run began (`Inventory.shards`). Of one that is gone since, the samples keep their
            place and cannot be read, if the index still has them: so nothing of the order changes.
        progress: show it where indexing takes long.

    Raises:
        UserError: no shards, or none that holds a sample.
    """

    def __init__(
        self,
        patterns: Patterns,
        captioned: bool = True,
        suffixes: Sequence[str] = IMAGE_SUFFIXES,
        known: Sequence[str] = (),
        progress: bool = False,
    ):
        patterns = patterns if isinstance(patterns, str | Path) else list(patterns)
        index = _index_with_gone(patterns, suffixes, [Path(shard) for shard in known])
        self.index: TarIndex = index or load_or_build_index(expand_shards(patterns), suffixes, progress)
        self.captioned = captioned
        if len(self.index) == 0:
            kinds, shards = ", ".join(suffixes), self.index.shards
            why = f": {self.index.damaged[0][1]}" if self.index.damaged else ""
            raise UserError(f"data.path: no samples ({kinds}) in {len(shards)} shards from {shards[0]}{why}")

    def __len__(self) -> int:
        return len(self.index)

    @property
    def damaged(self) -> list[tuple[str, str]]:
        """Tars and members that could not be read, with the reason; everything else is used."""
        return self.index.damaged

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Tars in which something may surprise, though nothing is lost, and what."""
        return self.index.notes

    @property
    def lost(self) -> int:
        """Samples that the damage cost, see `TarScan`."""
        return self.index.lost

    def name(self, index: int) -> str:
        """The tar's path and the sample's key."""
        shard, key = self.index.name(index)
        return f"{shard}#{key}"

    def sizes(self) -> Tensor:
        """(N,) int64: bytes of every sample's members."""
        return self.index.columns["locations"][:, 2::2].sum(1)

    def check(self, content: bytes) -> None:
        """Raises BadSample for what says of itself that it is none; images do not."""

    def inventory(self) -> Inventory:
        """The samples of every tar."""
        return self.index.inventory()

    def read(self, index: int) -> EncodedSample:
        """One sample. The tar is opened for it alone: no handles to keep, and a tar that is gone is noticed."""
        shard, sample = self.index[index]
        try:
            with open(shard, "rb", buffering=0) as tar:
                image = _read_at(tar.fileno(), sample.image)
                self.check(image)
                if not self.captioned:
                    return EncodedSample(image, "")
                text = _read_at(tar.fileno(), sample.text)
                as_json = b"" if text.strip() else _read_at(tar.fileno(), sample.json)
        except OSError as error:
            reason = f"cannot read the shard: {error.strerror or error}"
            raise LostFile(printable(shard), reason) from error
        return EncodedSample(image, caption_of(text, as_json))


def _index_with_gone(patterns: Patterns, suffixes: Sequence[str], known: Sequence[Path]) -> TarIndex | None:
    """The kept index of all known shards where some of them are gone; None where none is, or it does not fit."""
    gone = {shard for shard in known if not shard.is_file()}
    if not gone:
        return None
    try:
        found = expand_shards(patterns, gone)
    except UserError:
        return None
    index = load_index(known, suffixes) if {absolute(shard) for shard in found} <= set(known) else None
    if index is None:
        return None
    reason = "gone since the run began; its samples keep their places"
    return replace(index, damaged=index.damaged + [(printable(str(shard)), reason) for shard in sorted(gone)])


def _read_at(descriptor: int, span: Span) -> bytes:
    offset, size = span
    check_file_size(size)
    content = os.pread(descriptor, size, offset) if size else b""
    if len(content) != size:
        raise BadSample(f"the shard ends early: {len(content)} of {size} bytes")
    return content
