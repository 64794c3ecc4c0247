"""The index of tar shards: where every sample's image and caption lie.

It is one safetensors file of columns, memory-mapped when it is used, so that a hundred million samples cost no memory.
It lies beside the first shard, or in the cache folder where that one cannot be written, and is made again when a
shard's size or time has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsp.data.readers.names import IMAGE_SUFFIXES, and_more, printable
from fastsp.data.readers.tar_scan import TarScan, scan_tar
from fastsp.utils.cache import cache_folder
from fastsp.utils.files import new_file
from fastsp.utils.progress import late_bar

VERSION = 5


@dataclass(frozen=True)
class TarIndex:
    """The columns of the index, one row per sample, and the tars that they speak of."""

    shards: list[str]
    columns: dict[str, Tensor]
    """`locations` (N, 7) int64: shard, then offset and size of image, text and JSON; `keys` uint8: the keys' bytes one
    after the other; `key_ends` (N,) int64."""
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
    # Looked at before the tars are read: one that is still being written is indexed anew the next time.
    signature = json.dumps([VERSION, list(suffixes), [_signature(path) for path in paths]])
    name = f"index-{hashlib.sha256(json.dumps([str(path) for path in paths]).encode()).hexdigest()[:16]}.safetensors"
    places = (paths[0].parent / f".fastsp-{name}", cache_folder() / name)
    for place in places:
        if (index := _load(place, paths, signature)) is not None:
            return index
    index = build_index(paths, suffixes, progress)
    any(_save(index, signature, place) for place in places)  # in the first that can be written
    return index


def build_index(shards: Sequence[Path], suffixes: Sequence[str] = IMAGE_SUFFIXES, progress: bool = False) -> TarIndex:
    """Read the headers of the tars, several at a time. A tar that is damaged gives what can be read of it."""
    parts: list[dict[str, Tensor]] = []
    index = TarIndex([str(shard) for shard in shards], {}, [], [], 0)
    lost = 0
    with (
        late_bar("indexing tars", len(shards), progress) as advance,
        ThreadPoolExecutor(min(16, len(shards))) as pool,
    ):
        found = pool.map(lambda number: _indexed(number, shards[number], suffixes), range(len(shards)))
        for shard, (columns, scan) in zip(map(printable, index.shards), found, strict=True):
            parts.append(columns)
            index.damaged.extend([(shard, and_more(scan.damages))] if scan.damages else [])
            index.damaged.extend((f"{shard}#{printable(member)}", reason) for member, reason in scan.unusable)
            index.notes.extend([(shard, "; ".join(scan.notes))] if scan.notes else [])
            lost += len(scan.damages)
            advance(1)
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    columns["key_ends"] = columns.pop("key_sizes").cumsum(0)
    return replace(index, columns=columns, lost=lost)


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
            columns = {name: file.get_tensor(name) for name in ("locations", "keys", "key_ends")}
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
