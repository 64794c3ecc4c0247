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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsp.data.inventory import Inventory, Part
from fastsp.data.readers.names import IMAGE_SUFFIXES, printable
from fastsp.data.readers.tar_scan import Sample, TarScan, scan_tar
from fastsp.utils.cache import cache_folder
from fastsp.utils.files import new_file
from fastsp.utils.progress import late_bar

VERSION = 4


@dataclass(frozen=True)
class TarIndex:
    """The columns of the index, one row per sample, and the tars that they speak of."""

    shards: list[str]
    columns: dict[str, Tensor]
    """`locations` (N, 7) int64: shard, then offset and size of image, text and JSON; `keys` uint8: the keys' bytes one
    after the other; `key_ends` (N,) int64."""
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Tars that are broken, and members that cannot be read (`TAR#MEMBER`), with the reason."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """Tars in which something may surprise, though nothing is lost."""
    lost: int = 0
    """Samples that the damage cost, see `TarScan`."""

    def __len__(self) -> int:
        return len(self.columns["locations"])

    def inventory(self) -> Inventory:
        """The samples of every tar."""
        sizes = torch.bincount(self.columns["locations"][:, 0], minlength=len(self.shards)).tolist()
        first, parts = 0, []
        for shard, size in zip(self.shards, sizes, strict=True):
            parts.append(Part(printable(Path(shard).name), size, self._names_sha256(first, first + size)))
            first += size
        return Inventory(tuple(parts))

    def _names_sha256(self, first: int, last: int) -> str:
        ends = self.columns["key_ends"][max(first - 1, 0) : last]
        start, stop = (int(ends[0]) if first else 0, int(ends[-1])) if last > first else (0, 0)
        digest = hashlib.sha256(self.columns["keys"][start:stop].numpy().tobytes())
        digest.update((self.columns["key_ends"][first:last] - start).numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> tuple[str, Sample]:
        """The sample's tar, and where it lies there."""
        shard, *spans = self.columns["locations"][index].tolist()
        return self.shards[shard], Sample((spans[0], spans[1]), (spans[2], spans[3]), (spans[4], spans[5]))

    def name(self, index: int) -> tuple[str, str]:
        """The sample's tar and key, in which bytes that are not UTF-8 are escaped."""
        ends = self.columns["key_ends"]
        start = int(ends[index - 1]) if index else 0
        key = bytes(self.columns["keys"][start : int(ends[index])].tolist()).decode(errors="surrogateescape")
        return printable(self[index][0]), printable(key)


def load_or_build_index(
    shards: Sequence[Path], suffixes: Sequence[str] = IMAGE_SUFFIXES, progress: bool = False
) -> TarIndex:
    """The index of these tars, from its file if that is up to date, else made and kept.

    Args:
        shards: the tars.
        suffixes: of the members that make a sample, in order of preference; its caption has the same key.
        progress: show it where making it takes long.
    """
    # Links are not followed: their names say more than those that a hub's cache gives what they lead to.
    paths = [Path(os.path.abspath(shard)) for shard in shards]
    # Looked at before the tars are read: one that is still being written is indexed anew the next time.
    signature = json.dumps([VERSION, list(suffixes), [_signature(path) for path in paths]])
    places = _places(paths)
    for place in places:
        if (index := _load(place, paths, signature)) is not None:
            return index
    index = build_index(paths, suffixes, progress)
    for place in places:
        if _save(index, signature, place):
            break
    return index


def build_index(shards: Sequence[Path], suffixes: Sequence[str] = IMAGE_SUFFIXES, progress: bool = False) -> TarIndex:
    """Read the headers of the tars, several at a time. A tar that is damaged gives what can be read of it."""
    scans: list[TarScan] = []
    parts: list[dict[str, Tensor]] = []
    with (
        late_bar("indexing tars", len(shards), progress) as advance,
        ThreadPoolExecutor(min(16, len(shards))) as pool,
    ):
        for columns, scan in pool.map(lambda number: _indexed(number, shards[number], suffixes), range(len(shards))):
            parts.append(columns)
            scans.append(scan)
            advance(1)
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    columns["key_ends"] = columns.pop("key_sizes").cumsum(0)
    damaged: list[tuple[str, str]] = []
    notes: list[tuple[str, str]] = []
    for name, scan in zip((printable(str(shard)) for shard in shards), scans, strict=True):
        damaged += [(name, printable(scan.damage))] if scan.damage else []
        damaged += [(f"{name}#{printable(member)}", printable(reason)) for member, reason in scan.unusable]
        notes += [(name, printable("; ".join(scan.notes)))] if scan.notes else []
    return TarIndex([str(shard) for shard in shards], columns, damaged, notes, sum(scan.lost for scan in scans))


def _indexed(number: int, shard: Path, suffixes: Sequence[str]) -> tuple[dict[str, Tensor], TarScan]:
    """One tar's rows, and what else was found, without the samples: as Python objects, those of a large data set would
    fill the memory."""
    scan = scan_tar(shard, suffixes)
    keys = [key.encode(errors="surrogateescape") for key, _ in scan.samples]
    rows = [(number, *image, *text, *as_json) for _, (image, text, as_json) in scan.samples]
    columns = {
        "locations": torch.tensor(rows, dtype=torch.int64).view(-1, 7),
        "keys": torch.tensor(list(b"".join(keys)), dtype=torch.uint8),
        "key_sizes": torch.tensor([len(key) for key in keys], dtype=torch.int64),
    }
    return columns, scan._replace(samples=[])


def _places(paths: Sequence[Path]) -> tuple[Path, Path]:
    """Where the index of these tars may be kept."""
    name = f"index-{hashlib.sha256(json.dumps([str(path) for path in paths]).encode()).hexdigest()[:16]}.safetensors"
    return paths[0].parent / f".fastsp-{name}", cache_folder() / name


def _signature(path: Path) -> list | None:
    """What changes when a tar does; None where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [str(path), status.st_size, status.st_mtime_ns]


def _load(place: Path, shards: Sequence[Path], signature: str) -> TarIndex | None:
    try:
        with safe_open(place, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("signature") != signature:
                return None
            columns = {name: file.get_tensor(name) for name in ("locations", "keys", "key_ends")}
        damaged, notes = ([(path, what) for path, what in json.loads(metadata[name])] for name in ("damaged", "notes"))
        return TarIndex([str(shard) for shard in shards], columns, damaged, notes, int(metadata["lost"]))
    except (OSError, SafetensorError, ValueError, TypeError, LookupError):
        return None


def _save(index: TarIndex, signature: str, place: Path) -> bool:
    """Write the index; false where that cannot be."""
    metadata = {
        "signature": signature,
        "damaged": json.dumps(index.damaged),
        "notes": json.dumps(index.notes),
        "lost": str(index.lost),
    }
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with new_file(place) as unfinished:
            save_file(index.columns, unfinished, metadata=metadata)
    except (OSError, SafetensorError):
        return False
    return True
