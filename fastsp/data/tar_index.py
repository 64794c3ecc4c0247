"""The index of tar shards: where every sample's image and caption lie.

It is one safetensors file of columns, memory-mapped when it is used, so that a hundred million samples cost no memory.
It lies beside the first shard, or in the cache folder where that one cannot be written, and is made again when a
shard's size or time has changed.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsp.data.cache import cache_folder
from fastsp.files import new_file

VERSION = 1
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
BLOCK = 512  # a tar is a sequence of blocks of this many bytes


class Entry(NamedTuple):
    """Where one sample lies: byte offsets and sizes in its tar. A caption that is missing has size 0."""

    shard: str
    image_offset: int
    image_size: int
    caption_offset: int
    caption_size: int
    caption_is_json: bool


@dataclass(frozen=True)
class TarIndex:
    """The columns of the index, one row per sample, and the tars that they speak of."""

    shards: list[str]
    damaged: list[tuple[str, str]]
    """Tars that end early or are broken inside, with the reason."""
    columns: dict[str, Tensor]
    """`locations` (N, 6) int64: shard, image offset and size, caption offset and size, caption is JSON; `keys` uint8:
    the keys' UTF-8 one after the other; `key_ends` (N,) int64."""

    def __len__(self) -> int:
        return len(self.columns["locations"])

    def __getitem__(self, index: int) -> Entry:
        shard, image, image_size, caption, caption_size, is_json = self.columns["locations"][index].tolist()
        return Entry(self.shards[shard], image, image_size, caption, caption_size, bool(is_json))

    def name(self, index: int) -> tuple[str, str]:
        """The sample's tar and key."""
        ends = self.columns["key_ends"]
        start = int(ends[index - 1]) if index else 0
        key = bytes(self.columns["keys"][start : int(ends[index])].tolist()).decode()
        return self[index].shard, key


def load_or_build_index(shards: Sequence[Path], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> TarIndex:
    """The index of these tars, from its file if that is up to date, else made and kept.

    Args:
        shards: the tars.
        suffixes: of the members that make a sample, in order of preference; its caption has the same key.
    """
    paths = [shard.resolve() for shard in shards]
    signature = json.dumps([VERSION, list(suffixes), [_signature(path) for path in paths]])
    name = f"index-{hashlib.sha256(json.dumps([str(path) for path in paths]).encode()).hexdigest()[:16]}.safetensors"
    places = [paths[0].parent / f".fastsp-{name}", cache_folder() / name]
    for place in places:
        index = _load(place, signature, paths)
        if index is not None:
            return index
    index = build_index(paths, suffixes)
    for place in places:
        if _save(index, signature, place):
            break
    return index


def build_index(shards: Sequence[Path], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> TarIndex:
    """Read the headers of the tars, several at a time. A tar that is damaged gives what lies before the damage."""
    with ThreadPoolExecutor(min(16, len(shards))) as pool:
        parts = list(pool.map(lambda number: _part(number, scan_tar(shards[number], suffixes)), range(len(shards))))
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    columns["key_ends"] = columns.pop("key_sizes").cumsum(0)
    damaged = [(str(shard), part.damage) for shard, part in zip(shards, parts, strict=True) if part.damage]
    return TarIndex([str(shard) for shard in shards], damaged, columns)


class _Part(NamedTuple):
    """One tar's rows of the index, and its damage."""

    columns: dict[str, Tensor]
    damage: str | None


def _part(number: int, scan: TarScan) -> _Part:
    """Packed at once: as Python objects, the samples of a large data set would fill the memory."""
    keys = [key.encode() for key, _ in scan.samples]
    columns = {
        "locations": torch.tensor([(number, *place) for _, place in scan.samples], dtype=torch.int64).view(-1, 6),
        "keys": torch.tensor(list(b"".join(keys)), dtype=torch.uint8),
        "key_sizes": torch.tensor([len(key) for key in keys], dtype=torch.int64),
    }
    return _Part(columns, scan.damage)


class TarScan(NamedTuple):
    """The samples of one tar as (key, (image offset, size, caption offset, size, caption is JSON)), and its damage."""

    samples: list[tuple[str, tuple[int, int, int, int, int]]]
    damage: str | None


def scan_tar(path: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> TarScan:
    """Read one tar's headers, seeking over the contents."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    damage = None
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and member.offset_data + member.size <= size:
                    key, suffix = _split_name(member.name)
                    members.setdefault(key, {})[suffix] = (member.offset_data, member.size)
            damage = _damage_at(path, tar.offset)
    except (tarfile.TarError, OSError) as error:
        damage = f"not a whole tar file: {error}"
    samples = [(key, place) for key, files in members.items() if (place := _place(files, suffixes))]
    return TarScan(samples, damage)


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's key and suffix: `a/b.c.jpg` is `a/b` and `c.jpg`; only the last part of the suffix counts here."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _place(files: dict[str, tuple[int, int]], suffixes: Sequence[str]) -> tuple[int, int, int, int, int] | None:
    image = next((files[suffix] for suffix in suffixes if suffix in files), None)
    if image is None:
        return None
    is_json = "txt" not in files and "json" in files
    caption = files.get("txt") or files.get("json") or (0, 0)
    return (*image, *caption, int(is_json))


def _damage_at(path: Path, end: int) -> str | None:
    """`tarfile` stops silently at a damaged header; a whole archive ends with a block of zeros, or with the file."""
    with path.open("rb") as tar:
        tar.seek(end - end % BLOCK)
        block = tar.read(BLOCK)
    return f"damaged tar header at byte {end}" if block.strip(b"\0") else None


def _signature(path: Path) -> list:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _load(place: Path, signature: str, shards: Sequence[Path]) -> TarIndex | None:
    try:
        with safe_open(place, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("signature") != signature:
                return None
            columns = {name: file.get_tensor(name) for name in ("locations", "keys", "key_ends")}
    except (OSError, SafetensorError):
        return None
    damaged = [(path, reason) for path, reason in json.loads(metadata["damaged"])]
    return TarIndex([str(shard) for shard in shards], damaged, columns)


def _save(index: TarIndex, signature: str, place: Path) -> bool:
    """Write the index; false where that cannot be."""
    metadata = {"signature": signature, "damaged": json.dumps(index.damaged)}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with new_file(place) as unfinished:
            save_file(index.columns, unfinished, metadata=metadata)
    except (OSError, SafetensorError):
        return False
    return True
