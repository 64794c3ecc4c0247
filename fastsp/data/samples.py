"""What the readers of every layout have in common: a sample's bytes, and why one is bad."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from fastsp.data.inventory import Inventory

T = TypeVar("T")
Item = TypeVar("Item")
MAX_FILE_BYTES = 2_000_000_000  # an uncompressed image of the largest size, of 16 bits and with alpha, has 1.4e9


@dataclass(frozen=True)
class EncodedSample:
    """One sample as it lies in the data set."""

    content: bytes  # the image file (JPEG, PNG, WebP, ...), or the latents' safetensors
    caption: str
    mask: bytes | None = None  # an image file, where masks are read and there is one


class BadSample(Exception):  # noqa: N818 - it is the sample that is bad, and the run goes on
    """A sample that cannot be trained on, and why: one line, without the sample's name."""


def check_file_size(size: int) -> None:
    """Raises `BadSample` for a file that would fill the memory."""
    if size > MAX_FILE_BYTES:
        raise BadSample(f"too large: {size} bytes")


def in_shares(
    pool: Executor, shares: int, function: Callable[[Item], T], items: Sequence[Item]
) -> Iterator[T | BadSample]:
    """The function's results, in order; a `BadSample` that it raises is one. The pool gets the items in so many shares:
    of one at a time, the handing over would cost more than a small image."""

    def result(item: Item) -> T | BadSample:
        try:
            return function(item)
        except BadSample as bad:
            return bad

    size = -(-len(items) // shares) or 1
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    return chain.from_iterable(pool.map(lambda part: [*map(result, part)], parts))


class Part(NamedTuple):
    """Samples of a step that have one shape."""

    rows: list[int]
    shape: tuple[int, int]  # height and width, pixels


@dataclass(frozen=True)
class ReadStep:
    """One rank's samples of one optimizer step as they were read, in the order of their positions."""

    positions: Tensor  # (B,) int64: positions in the run
    indices: list[int]  # the samples' indices in the data set
    samples: list[EncodedSample | BadSample]
    parts: Sequence[Part] | None = None  # where shapes may differ; None: all have that of the configuration


class SampleReader(Protocol):
    """Random access to the samples of one data set, in a fixed order. Safe to call from many threads at once."""

    captioned: bool  # whether captions are read; else they are empty
    damaged: list[tuple[str, str]]  # files that could not be used, or only in part, with the reason
    notes: list[tuple[str, str]]  # files in which something may surprise, though nothing is lost, and what
    lost: int  # samples that the damage cost and that therefore have no index, at least

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The sample's name, which is unique in the data set and tells a person where to look."""

    def inventory(self) -> Inventory:
        """What the data set consists of: the same as long as the samples and their order are."""

    def read(self, index: int) -> EncodedSample:
        """The sample's bytes and caption; raises BadSample where they cannot be read."""
