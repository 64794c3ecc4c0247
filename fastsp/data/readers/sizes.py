"""The sizes of all samples of a data set, by the first bytes of each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastsp.data.samples import BadSample, in_shares
from fastsp.utils.progress import late_bar

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
            sizes[indices] = torch.tensor([(0, 0) if isinstance(pair, BadSample) else pair for pair in found])
            advance(len(indices))
    return sizes
