"""Random access to tar shards in WebDataset layout, through an index that is made once.

A sample is the members of one tar that share a key, the part of the name before the first dot of its last component: an
image, and a caption as `.txt`, or as `.json` with the caption under "caption" or "text" as img2dataset writes it. The
index holds where they lie, so that any sample is one seek away and the order of an epoch is free.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path

from fastsp.data.captions import caption_from_json, caption_from_text
from fastsp.data.samples import BadSample, EncodedSample
from fastsp.data.tar_index import IMAGE_SUFFIXES, TarIndex, load_or_build_index
from fastsp.errors import UserError


def expand_shards(patterns: str | Path | Iterable[str | Path]) -> list[Path]:
    """The tar files that patterns stand for, in the order given and each pattern's sorted by name.

    Args:
        patterns: one or several of: a tar file, a folder of them, or a pattern with braces (`{00000..00231}`, `{a,b}`)
            and wildcards (`*`, `?`, `[0-9]`, `**`).

    Raises:
        UserError: a name in braces is missing, or a pattern matches nothing.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    shards = [shard for pattern in patterns for name in expand_braces(str(pattern)) for shard in _matches(name)]
    if not shards:
        raise UserError("data.path names no shards; allowed: tar files, folders of them, brace and glob patterns")
    return list(dict.fromkeys(shards))


def expand_braces(pattern: str) -> list[str]:
    """Shell braces: `{00..11}` counts, keeping leading zeros, and `{a,b}` lists; several multiply, leftmost slowest."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if counted:
        first, last = counted.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in choices for name in expand_braces(before + choice + after)]


def _matches(name: str) -> list[Path]:
    path = Path(name).expanduser()
    found = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.is_file() else []
    found = found or sorted(Path(match) for match in glob(str(path), recursive=True) if match.endswith(".tar"))
    if not found:
        raise UserError(f"data.path: no shard at {name!r}; allowed: tar files, their folders, brace and glob patterns")
    return found


class ShardReader:
    """The samples of tar shards, by index: shard after shard, in the order in which they lie there.

    Args:
        patterns: see `expand_shards`.
        captioned: whether a sample needs a caption; if not, captions are not read and are empty.
        suffixes: of the members that make a sample; images, if nothing else is said.

    Raises:
        UserError: no shards, or none that holds a sample.
    """

    def __init__(
        self,
        patterns: str | Path | Iterable[str | Path],
        captioned: bool = True,
        suffixes: Sequence[str] = IMAGE_SUFFIXES,
    ):
        self.index: TarIndex = load_or_build_index(expand_shards(patterns), suffixes)
        self.captioned = captioned
        if len(self.index) == 0:
            kinds = ", ".join(suffixes)
            raise UserError(
                f"data.path: no samples ({kinds}) in {len(self.index.shards)} shards from {self.index.shards[0]}"
            )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def damaged(self) -> list[tuple[str, str]]:
        """Tars that could be read only in part, with the reason; their samples up to the damage are used."""
        return self.index.damaged

    def name(self, index: int) -> str:
        """The tar's path and the sample's key."""
        shard, key = self.index.name(index)
        return f"{shard}#{key}"

    def read(self, index: int) -> EncodedSample:
        """One sample. The tar is opened for it alone: no handles to keep, and a tar that is gone is noticed."""
        entry = self.index[index]
        try:
            with open(entry.shard, "rb", buffering=0) as tar:
                image = _read_at(tar.fileno(), entry.image_offset, entry.image_size)
                text = _read_at(tar.fileno(), entry.caption_offset, entry.caption_size) if self.captioned else b""
        except OSError as error:
            raise BadSample(f"cannot read the shard: {error.strerror or error}") from error
        if not self.captioned:
            return EncodedSample(image, "")
        return EncodedSample(image, caption_from_json(text) if entry.caption_is_json else caption_from_text(text))


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    content = os.pread(descriptor, size, offset)
    if len(content) != size:
        raise BadSample(f"the shard ends early: {len(content)} of {size} bytes")
    return content
