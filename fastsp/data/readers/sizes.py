"""The sizes of all samples of a data set, by the first bytes of each; those of files, and of rows in them, are kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsp.data.samples import BadSample, in_shares
from fastsp.errors import UserError
from fastsp.utils.cache import cache_folder
from fastsp.utils.files import new_file
from fastsp.utils.progress import late_bar

VERSION = 1  # of what is kept

HEAD = 1 << 16  # bytes: the header of a photograph holds a preview of it
_AT_ONCE = 4096

Size = tuple[int, int]  # height and width


def measured(first: Callable[[int | None], bytes], size_of: Callable[[bytes], Size | None]) -> Size:
    """The size of a sample, (0, 0) where that is not to be had. ``first`` reads so many bytes of it, None: all; it may
    raise BadSample. ``size_of`` says None where it needs more."""
    try:
        head = first(HEAD)
        size = size_of(head)
        if size is None and len(head) == HEAD:
            size = size_of(first(None))
    except BadSample:
        size = None
    return size or (0, 0)


def measure_all(size: Callable[[int], Size], count: int, workers: int, progress: bool) -> Tensor:
    """``size`` of each sample, (N, 2) int64, in threads."""
    sizes = torch.zeros(count, 2, dtype=torch.int64)
    with (
        late_bar("reading sizes", count, progress) as advance,
        ThreadPoolExecutor(workers, "fastsp-sizes") as pool,
    ):
        for indices in torch.arange(count).split(_AT_ONCE):
            found = in_shares(pool, workers, size, indices.tolist())
            pairs = [(0, 0) if isinstance(pair, BadSample) else pair for pair in found]
            sizes[indices] = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
            advance(len(indices))
    return sizes


def measure_files(
    root: Path, paths: Sequence[str], size: Callable[[int], Size], workers: int, progress: bool
) -> Tensor:
    """:func:`measure_changed` of the files at these paths below a folder."""
    return measure_changed(root, paths, _lengths_and_times(root, paths, workers), size, workers, progress)


def measure_changed(
    root: Path, names: Sequence[str], files: Tensor, size: Callable[[int], Size], workers: int, progress: bool
) -> Tensor:
    """:func:`measure_all` of samples with these names below a folder. Only those are read that are not in the cache
    with the same length and time of change of their ``files``, (N, 2) int64; what has no size is tried again."""
    kept = _kept(root)
    rows = {name: row for row, name in enumerate(kept)}
    known = torch.tensor([rows.get(name, -1) for name in names])
    found = torch.tensor([*kept.values(), (0, 0, 0, 0)])[known]  # the last one for those that are new
    read = ((found[:, :2] != files).any(1) | (found[:, 2:] == 0).any(1)).nonzero().flatten()
    wanted = read.tolist()
    sizes = found[:, 2:].clone()
    sizes[read] = measure_all(lambda number: size(wanted[number]), len(wanted), workers, progress)
    now = torch.cat([files, sizes], dim=1)
    if len(kept) != len(names) or not torch.equal(now, found):
        _keep(root, names, now)
    return sizes


def length_and_time(file: str | Path) -> tuple[int, int]:
    """Bytes and nanoseconds; -1 where there is no such file."""
    try:
        status = os.stat(file)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _lengths_and_times(root: Path, paths: Sequence[str], workers: int) -> Tensor:
    """Of each file, (N, 2) int64. Asked before it is read: one that is still being written is read again the next
    time."""
    with ThreadPoolExecutor(workers, "fastsp-sizes") as pool:
        return torch.tensor([*in_shares(pool, workers, lambda path: length_and_time(root / path), paths)])


def _place(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
    return cache_folder() / f"sizes-{VERSION}-{name}.safetensors"


def _kept(root: Path) -> dict[str, tuple[int, ...]]:
    """By path: bytes, nanoseconds, height and width, as they were; empty where nothing is kept."""
    with suppress(OSError, UserError, SafetensorError, ValueError, LookupError):
        tensors = load_file(_place(root))
        paths = map(os.fsdecode, bytes(tensors["paths"].numpy()).split(b"\0"))
        return dict(zip(paths, map(tuple, tensors["files"].tolist()), strict=True))
    return {}


def _keep(root: Path, paths: Sequence[str], files: Tensor) -> None:
    """Where nothing can be written, they are read again the next time."""
    names = bytearray(b"\0".join(map(os.fsencode, paths)))
    with suppress(OSError, UserError, SafetensorError):
        place = _place(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        with new_file(place) as unfinished:
            save_file({"paths": torch.frombuffer(names, dtype=torch.uint8), "files": files}, unfinished)
